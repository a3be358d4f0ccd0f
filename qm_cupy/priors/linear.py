"""One layer of the priors: a norm, a linear map, an activation and a residual."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from ..cuda.constants import ACTIVATIONS, SQUARE, WARP
from ..cuda.device import empty
from ..cuda.launch import contiguous, launch
from ..cuda.tiles import WHOLE, Tiling
from ..settings import implementation

Activation = Literal["none", "relu", "gelu"]

_EPSILON = 1e-5  # ε of the norms: the default of torch's LayerNorm
_FEW = 16  # rows up to which one warp for each output is fast
# Rows that one block sums for a tile of a weight's gradient. Example: 8,192 rows are 16
# parts; with D = 1024 and the prior's H = 256, 16 tiles each make 256 blocks. Each part
# needs as much memory as the weights, so their number is limited.
_PART_ROWS, _MAX_PARTS = 512, 32


class Norm(NamedTuple):
    """Weights of a LayerNorm, or of an RMSNorm if `bias` is None."""

    weight: NDArray[Any]  # (D,)
    bias: NDArray[Any] | None  # (D,)


def linear(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    *,
    norm: Norm | None = None,
    activation: Activation = "none",
    residual: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return activation(norm(x) Wᵀ + b) + residual for x (..., D).

    All arrays have one dtype. `weight` is W, stored as (out, in) like in torch.
    """
    if is_cuda(x):
        return _linear_cuda(x, weight, bias, norm, activation, residual)
    return _linear_reference(x, weight, bias, norm, activation, residual)


def _linear_reference(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    norm: Norm | None,
    activation: Activation,
    residual: NDArray[Any] | None,
) -> NDArray[Any]:
    y: NDArray[Any] = (x if norm is None else _normalize_reference(x, norm)) @ weight.T
    y += bias
    if activation == "relu":
        np.maximum(y, 0, out=y)
    elif activation == "gelu":
        from scipy.special import erf  # slow to import

        # Exact GELU: y Φ(y) = y (1 + erf(y / √2)) / 2.
        y *= (1 + erf(y * 0.5**0.5)) / 2
    if residual is not None:
        y += residual
    return y


def _normalize_reference(x: NDArray[Any], norm: Norm) -> NDArray[Any]:
    # RMSNorm:   y = g · x / √(mean x² + ε)
    # LayerNorm: y = g · (x - mean x) / √(mean (x - mean x)² + ε) + b
    if norm.bias is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    squares = np.einsum("...d,...d->...", x, x)[..., None]  # (..., 1)
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
    dtype = x.dtype
    out_dim, in_dim = weight.shape
    x, rows = contiguous(x), math.prod(x.shape[:-1])
    out = empty((*x.shape[:-1], out_dim), dtype)
    sizes = rows, in_dim, out_dim, ACTIVATIONS[activation]
    residual = contiguous(residual)
    map_ = weight, bias, residual
    # A step of decoding has few rows: reading the weights dominates, and tiles would be
    # nearly empty. Instead, a warp computes each output, with the norm included.
    if implementation() == "optimized" and rows <= _FEW:
        args = (x, *(norm or (None, None)), *map_, *sizes, _EPSILON, out)
        launch("linear", "linear_few", dtype, args, rows=out.size)
        return out
    # With many rows the norm is a kernel of its own, so that each row is normalized
    # once and not again for every tile of columns.
    if norm is not None:
        x = _normalize_cuda(x, norm)
    args = (x, *map_, *sizes, out)
    tiling = Tiling(1, rows, out_dim)
    launch("linear", "linear", dtype, args, outputs=out.size, tiles=tiling)
    return out


def _normalize_cuda(x: Any, norm: Norm) -> Any:
    out, rows = empty(x.shape, x.dtype), math.prod(x.shape[:-1])
    args = (x, *norm, rows, x.shape[-1], _EPSILON, out)
    launch("linear", "normalize", x.dtype, args, outputs=out.size, rows=rows)
    return out


def linear_vjp_cuda(
    gradient: Any, x: Any, weight: Any, *, rectified: bool = False
) -> tuple[Any, Any, Any]:
    """Return the gradients of x (..., in), weight (out, in) and bias of a layer.

    For y = x Wᵀ + b: dx = dy W, dW = dyᵀ x, and db = Σ dy over all rows.

    `rectified` means that x is the output of a ReLU. The first result is then the
    gradient of the ReLU's input: dy W where x > 0, and 0 elsewhere.
    """
    gate = x if rectified else None
    if implementation() == "basic":
        return _linear_vjp_basic(gradient, x, weight, gate)
    return _linear_vjp_optimized(gradient, x, weight, gate)


def _linear_vjp_basic(
    gradient: Any, x: Any, weight: Any, gate: Any
) -> tuple[Any, Any, Any]:
    (out_dim, in_dim), rows = weight.shape, math.prod(x.shape[:-1])
    dtype, page = x.dtype, "linear_vjp"
    by_x, by_weight = empty(x.shape, dtype), empty(weight.shape, dtype)
    by_bias = empty((out_dim,), dtype)
    args: tuple[Any, ...] = (gradient, weight, gate, rows, in_dim, out_dim, by_x)
    launch(page, "linear_vjp", dtype, args, outputs=by_x.size)
    args = (gradient, x, rows, in_dim, out_dim, by_weight)
    launch(page, "weight_vjp", dtype, args, outputs=by_weight.size)
    args = (gradient, rows, out_dim, by_bias)
    launch(page, "bias_vjp", dtype, args, outputs=by_bias.size)
    return by_x, by_weight, by_bias


def _linear_vjp_optimized(
    gradient: Any, x: Any, weight: Any, gate: Any
) -> tuple[Any, Any, Any]:
    # The tile kernel computes A Bᵀ from the rows of A and B, so each operand with its
    # sum over rows is transposed first: dx = dy (Wᵀ)ᵀ.
    out_dim, rows = len(weight), math.prod(x.shape[:-1])
    across = _transposed_cuda(weight, out_dim)  # (1, in, out)
    by_x = _products_cuda(gradient.reshape(1, rows, out_dim), across, gate)
    # dW sums over all rows, which may be many, and has few tiles. S parts of the rows
    # are summed side by side, to keep the GPU busy.
    parts = min(max(-(-rows // _PART_ROWS), 1), _MAX_PARTS)
    part = -(-max(rows, 1) // parts)  # rows of a part
    part = -(-part // WARP) * WARP  # a whole number of 16-byte vectors
    turned = _transposed_cuda(gradient, part)  # (S, out, part)
    by_weight = _products_cuda(turned, _transposed_cuda(x, part))  # (S, out, in)
    page, num_parts, dtype = "linear_vjp", len(turned), x.dtype
    args: tuple[Any, ...]
    if num_parts > 1:
        # Parts are added in index order: the float sums are the same in every run.
        sums, by_weight = by_weight, empty(weight.shape, dtype)
        args = (sums, num_parts, by_weight.size, by_weight)
        launch(page, "sum_parts", dtype, args, outputs=by_weight.size)
    by_bias = empty((out_dim,), dtype)
    args = (turned, num_parts, out_dim, part, by_bias)
    launch(page, "bias_vjp", dtype, args, rows=out_dim)
    return by_x.reshape(x.shape), by_weight.reshape(weight.shape), by_bias


def _transposed_cuda(x: Any, part: int) -> Any:
    """Return x (..., columns) as (S, columns, part), `part` rows in each of S parts.

    The last part is padded with zeros.
    """
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_parts = max(-(-rows // part), 1)
    out = empty((num_parts, columns, part), x.dtype)
    squares = num_parts * -(-columns // SQUARE) * -(-part // SQUARE)
    args = (x, rows, columns, part, num_parts, out)
    launch("linear_vjp", "transpose", x.dtype, args, blocks=squares)
    return out


def _products_cuda(a: Any, b: Any, gate: Any = None) -> Any:
    """Return A Bᵀ of every part, (S, rows, columns); 0 where `gate` is not above 0."""
    (num_parts, rows, dim), columns = a.shape, b.shape[-2]  # a (S, rows, dim)
    out = empty((num_parts, rows, columns), a.dtype)
    tiling = Tiling(num_parts, rows, columns)
    args = (a, b, gate, rows, columns, dim, out)
    launch("linear_vjp", "products", a.dtype, args, tiles=tiling, shape=WHOLE)
    return out
