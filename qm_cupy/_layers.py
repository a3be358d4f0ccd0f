"""A layer of the priors: a norm, a linear map, an activation, a residual."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from . import _cuda, _tiles

Activation = Literal["none", "relu", "gelu"]

_ACTIVATIONS = "none", "relu", "gelu"  # by the kernels' numbers
_EPSILON = 1e-5  # of the norms
_FEW = 16  # rows that a warp an output is fast for


class Norm(NamedTuple):
    """LayerNorm, or RMSNorm if it has no bias; both of shape (D,)."""

    weight: NDArray[Any]
    bias: NDArray[Any] | None


def linear(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    *,
    norm: Norm | None = None,
    activation: Activation = "none",
    residual: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return activation(norm(x) Wᵀ + b) + residual of x (..., D), all of one dtype."""
    layer = _linear_cuda if _cuda.is_cuda(x) else _linear_reference
    return layer(x, weight, bias, norm, activation, residual)


def _linear_reference(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    norm: Norm | None,
    activation: Activation,
    residual: NDArray[Any] | None,
) -> NDArray[Any]:
    y: NDArray[Any] = (x if norm is None else _normalize(x, norm)) @ weight.T
    y += bias
    if activation == "relu":
        np.maximum(y, 0, out=y)
    elif activation == "gelu":
        y *= (1 + erf(y * 0.5**0.5)) / 2
    if residual is not None:
        y += residual
    return y


def _normalize(x: NDArray[Any], norm: Norm) -> NDArray[Any]:
    if norm.bias is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    squares = np.einsum("...d,...d->...", x, x)[..., None]
    y = x / np.sqrt(squares / x.shape[-1] + _EPSILON).astype(x.dtype)
    y *= norm.weight
    if norm.bias is not None:
        y += norm.bias
    return y


def _linear_cuda(
    x: Any,
    weight: Any,
    bias: Any,
    norm: Norm | None,
    activation: Activation,
    residual: Any,
) -> Any:
    chosen, kind = _cuda.implementation(), x.dtype
    out_dim, in_dim = weight.shape
    x, rows = _cuda.contiguous(x), math.prod(x.shape[:-1])
    out = _cuda.empty((*x.shape[:-1], out_dim), kind)
    sizes = rows, in_dim, out_dim, _ACTIVATIONS.index(activation)
    residual = _cuda.contiguous(residual)
    file, map_ = f"{chosen}/alignment", (weight, bias, residual)
    if chosen == "optimized" and rows <= _FEW:
        args = (x, *(norm or (None, None)), *map_, *sizes, _EPSILON, out)
        _cuda.launch(file, "linear_few", kind, out.size * _cuda.WARP, args)
        return out
    if norm is not None:
        x = _normalize_cuda(x, norm)
    args = (x, *map_, *sizes, out)
    if chosen == "basic":
        _cuda.launch(file, "linear", kind, out.size, args)
        return out

    def blocks(shape: _tiles.Shape) -> int:
        return _tiles.row_tiles(shape, rows) * _tiles.column_tiles(shape, out_dim)

    shape = _tiles.select_shape(blocks)
    _tiles.launch("alignment", "linear", kind, shape, blocks(shape), args)
    return out


def _normalize_cuda(x: Any, norm: Norm) -> Any:
    chosen, dim = _cuda.implementation(), x.shape[-1]
    out, rows = _cuda.empty(x.shape, x.dtype), math.prod(x.shape[:-1])
    threads = out.size if chosen == "basic" else rows * _cuda.WARP
    args = (x, *norm, rows, dim, _EPSILON, out)
    _cuda.launch(f"{chosen}/transformer_prior", "normalize", x.dtype, threads, args)
    return out
