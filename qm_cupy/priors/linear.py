"""One layer of the priors: a norm, a linear map, an activation and a residual.

A prior is a model that predicts a merged token from the tokens before it. A layer maps
rows x of `in` entries to rows y of `out` entries. W (out, in) is its weight, and b
(out,) is its bias, which may be absent. A letter d before a name means the gradient of
a loss with respect to the quantity.
"""

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

Activation = Literal["none", "relu", "gelu", "silu"]

_EPSILON = 1e-5  # ε of the norms: the default of torch's LayerNorm
_MAX_WARP_ROWS = 16  # up to this many rows, one warp for each output is fast
# One block sums up to _PART_ROWS rows for a tile of dW, or more rows if there would be
# more than _MAX_PARTS parts. For example, 8,192 rows are 16 parts. With tokens of width
# 1024 and the prior's hidden width of 256, dW has 16 tiles of 128 × 128 entries, so 16
# parts have 256 blocks. The sums of each part need as much memory as W, so the number
# of parts is limited.
_PART_ROWS, _MAX_PARTS = 512, 32


class Norm(NamedTuple):
    """Weights of a LayerNorm, or of an RMSNorm if `bias` is None."""

    weight: NDArray[Any]  # (in,)
    bias: NDArray[Any] | None  # (in,)
    epsilon: float = _EPSILON  # ε


def linear(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    *,
    norm: Norm | None = None,
    activation: Activation = "none",
    residual: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return activation(norm(x) Wᵀ + b) + residual, (..., out), for x (..., in).

    All arrays have one dtype. `weight` is W, stored as (out, in) like in torch, and
    `bias` is b (out,), or None.
    """
    if is_cuda(x):
        return _linear_cuda(x, weight, bias, norm, activation, residual)
    return _linear_reference(x, weight, bias, norm, activation, residual)


def _linear_reference(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    norm: Norm | None,
    activation: Activation,
    residual: NDArray[Any] | None,
) -> NDArray[Any]:
    y: NDArray[Any] = (x if norm is None else _normalize_reference(x, norm)) @ weight.T
    if bias is not None:
        y += bias
    if activation == "relu":
        np.maximum(y, 0, out=y)
    elif activation == "gelu":
        from scipy.special import erf  # slow to import

        # Exact GELU: y Φ(y) = y (1 + erf(y / √2)) / 2. Φ is the cumulative distribution
        # function of the standard normal distribution.
        y *= (1 + erf(y * 0.5**0.5)) / 2
    elif activation == "silu":
        # y / (1 + e^-y). If e^-y overflows, the result rounds to 0, which is right.
        with np.errstate(over="ignore"):
            y /= 1 + np.exp(-y)
    if residual is not None:
        y += residual
    return y


def _normalize_reference(x: NDArray[Any], norm: Norm) -> NDArray[Any]:
    # With the weight g and the bias b of the norm, and means over the entries of a row:
    # RMSNorm:   y = g · x / √(mean x² + ε)
    # LayerNorm: y = g · (x - mean x) / √(mean (x - mean x)² + ε) + b
    if norm.bias is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    squares = np.einsum("...d,...d->...", x, x)[..., None]  # (..., 1)
    y = x / np.sqrt(squares / x.shape[-1] + norm.epsilon).astype(x.dtype)
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
    x, num_rows = contiguous(x), math.prod(x.shape[:-1])
    out = empty((*x.shape[:-1], out_dim), dtype)
    sizes = num_rows, in_dim, out_dim, ACTIVATIONS[activation]
    residual = contiguous(residual)
    weights = weight, bias, residual
    # A step of decoding has few rows. Most of its time is the reading of the weights,
    # and tiles would be nearly empty. So one warp computes each output, including the
    # norm.
    if implementation() == "optimized" and num_rows <= _MAX_WARP_ROWS:
        gain, shift, epsilon = norm or (None, None, _EPSILON)
        args: tuple[Any, ...] = (x, gain, shift, *weights, *sizes, epsilon, out)
        launch("linear", "linear_few", dtype, args, rows=out.size)
        return out
    # Otherwise the norm is a kernel of its own. So each row is normalized once, and not
    # once for every tile of columns.
    if norm is not None:
        x = _normalize_cuda(x, norm)
    args = (x, *weights, *sizes, out)
    tiling = Tiling(1, num_rows, out_dim)
    launch("linear", "linear", dtype, args, outputs=out.size, tiles=tiling)
    return out


def _normalize_cuda(x: Any, norm: Norm) -> Any:
    out, num_rows = empty(x.shape, x.dtype), math.prod(x.shape[:-1])
    sizes = num_rows, x.shape[-1], norm.epsilon
    args = (x, norm.weight, norm.bias, *sizes, out)
    launch("linear", "normalize", x.dtype, args, outputs=out.size, rows=num_rows)
    return out


def linear_vjp_cuda(
    dy: Any, x: Any, weight: Any, *, rectified: bool = False
) -> tuple[Any, Any, Any]:
    """Return dx (..., in), dW (out, in) and db (out,) of a layer, from dy (..., out).

    For y = x Wᵀ + b: dx = dy W, dW = dyᵀ x, and db = Σ dy over all rows.

    `rectified` means that x is the output of a ReLU. The first result is then the
    gradient of the ReLU's input: dy W where x > 0, and 0 elsewhere.
    """
    # The kernels set dx to 0 where `gate` is not above 0. If `gate` is None, dx is dy W
    # everywhere.
    gate = x if rectified else None
    if implementation() == "basic":
        return _linear_vjp_basic(dy, x, weight, gate)
    return _linear_vjp_optimized(dy, x, weight, gate)


def _linear_vjp_basic(dy: Any, x: Any, weight: Any, gate: Any) -> tuple[Any, Any, Any]:
    (out_dim, in_dim), num_rows = weight.shape, math.prod(x.shape[:-1])
    dtype, file = x.dtype, "linear_vjp"
    dx, dw = empty(x.shape, dtype), empty(weight.shape, dtype)
    db = empty((out_dim,), dtype)
    args: tuple[Any, ...] = (dy, weight, gate, num_rows, in_dim, out_dim, dx)
    launch(file, "linear_vjp", dtype, args, outputs=dx.size)
    args = (dy, x, num_rows, in_dim, out_dim, dw)
    launch(file, "weight_vjp", dtype, args, outputs=dw.size)
    args = (dy, num_rows, out_dim, db)
    launch(file, "bias_vjp", dtype, args, outputs=db.size)
    return dx, dw, db


def _linear_vjp_optimized(
    dy: Any, x: Any, weight: Any, gate: Any
) -> tuple[Any, Any, Any]:
    # The tile kernel computes A Bᵀ: it sums over the columns of A and of B. A matrix
    # that needs a sum over its rows is transposed first: W for dx = dy W, and both dy
    # and x for dW = dyᵀ x.
    out_dim, num_rows = len(weight), math.prod(x.shape[:-1])
    weight_columns = _transposed_cuda(weight, out_dim)  # (1, in, out)
    dx = _products_cuda(dy.reshape(1, num_rows, out_dim), weight_columns, gate)
    # dW has few tiles, and each tile is a sum over all rows, which may be many. To keep
    # the GPU busy, different blocks sum S parts of the rows at the same time.
    wanted_parts = min(max(-(-num_rows // _PART_ROWS), 1), _MAX_PARTS)
    part_rows = -(-max(num_rows, 1) // wanted_parts)
    # A transposed part has rows of `part_rows` entries. A multiple of WARP entries is a
    # whole number of 16-byte vectors.
    part_rows = -(-part_rows // WARP) * WARP
    dy_columns = _transposed_cuda(dy, part_rows)  # (S, out, part_rows)
    dw = _products_cuda(dy_columns, _transposed_cuda(x, part_rows))  # (S, out, in)
    file, num_parts, dtype = "linear_vjp", len(dy_columns), x.dtype
    args: tuple[Any, ...]
    if num_parts > 1:
        # Parts are added in the order of their index, so that every run gives the same
        # bits.
        part_sums, dw = dw, empty(weight.shape, dtype)
        args = (part_sums, num_parts, dw.size, dw)
        launch(file, "sum_parts", dtype, args, outputs=dw.size)
    db = empty((out_dim,), dtype)
    args = (dy_columns, num_parts, out_dim, part_rows, db)
    launch(file, "bias_vjp", dtype, args, rows=out_dim)
    return dx.reshape(x.shape), dw.reshape(weight.shape), db


def _transposed_cuda(x: Any, part_rows: int) -> Any:
    """Return x (..., columns), cut into S parts of rows, as (S, columns, part_rows).

    The last part is padded with zeros.
    """
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_parts = max(-(-num_rows // part_rows), 1)
    out = empty((num_parts, num_columns, part_rows), x.dtype)
    squares = num_parts * -(-num_columns // SQUARE) * -(-part_rows // SQUARE)
    args = (x, num_rows, num_columns, part_rows, num_parts, out)
    launch("linear_vjp", "transpose", x.dtype, args, blocks=squares)
    return out


def _products_cuda(a: Any, b: Any, gate: Any = None) -> Any:
    """Return A Bᵀ of each of S parts; 0 where `gate` is not above 0.

    `a` is (S, rows, dim), `b` is (S, columns, dim), and the result and the gate are
    (S, rows, columns).
    """
    (num_parts, rows, dim), columns = a.shape, b.shape[-2]
    out = empty((num_parts, rows, columns), a.dtype)
    tiling = Tiling(num_parts, rows, columns)
    args = (a, b, gate, rows, columns, dim, out)
    # The kernel is compiled only for whole tiles, 128 × 128 entries.
    launch("linear_vjp", "products", a.dtype, args, tiles=tiling, shape=WHOLE)
    return out
