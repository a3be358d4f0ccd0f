"""Vector–Jacobian product of alignment: from the gradient of its losses to its inputs.

Both networks are walked back by hand; there is no autograd engine.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import check_gradient, check_tokens
from ._fitting import back_propagate
from ._layers import linear
from .alignment import AlignmentLoss, _counts, _parts
from .merging import Merged
from .mlp_prior import MLP, MLPPrior, _running_mean, _running_mean_cuda, _sum_rows

# Rows that one block sums for a tile of a weight's gradient: 8,192 rows, D = 1024 and
# the prior's H = 256 make 256 blocks. Each part takes the memory of the weights.
_PART_ROWS, _MOST_PARTS = 512, 32


@on_callers_stream
def alignment_loss_vjp(
    gradient: AlignmentLoss[Any] | tuple[Any, Any, Any],
    merged: Array | Merged[Array],
    prior: MLPPrior,
    *,
    num_groups: Any = None,
) -> tuple[Array, tuple[MLP, MLP]]:
    r"""Gradients of `alignment_loss` with respect to tokens and the prior's weights.

    .. math:: \bar x_i = \sum_{t \ge i} \frac{\bar c_t}{t} - \bar y_{i-1}, \qquad
        \bar y_t = \frac{2 \bar L}{D (K - 1)} \bigl(f(c_t) - \tilde x_{t+1}\bigr)

    reading forwards, where :math:`c_t` is the mean of tokens 1..t and :math:`\bar c_t`
    what comes back through the network f. The mirror image for g is added.

    Parameters
    ----------
    gradient : AlignmentLoss or tuple
        Gradients of a loss with respect to ``forward``, ``backward`` and ``total``,
        each an ndarray of shape () or (B,) of any float dtype, or a number where it is
        one.
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        Merged tokens, as `alignment_loss` takes them.
    prior : MLPPrior
        The prior. ReLU has slope 0 at 0.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence where they differ, as in `alignment_loss`.

    Returns
    -------
    merged : ndarray of shape (K, D) or (B, K, D)
        Gradient of the loss with respect to the merged tokens, in their dtype; 0 for
        padding, and for K = 1.
    weights : tuple of two MLP
        That with respect to the weights of ``prior.forward`` and ``prior.backward``,
        beside `merged`; float32, or float64 for float64 tokens.

    Raises
    ------
    TypeError
        If `prior` is no `MLPPrior`, `merged` or a gradient not floating, `gradient` no
        three, or `num_groups` not integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import MLPPrior
    >>> prior = MLPPrior.init(8, seed=0)
    >>> slope, (forward, backward) = alignment_loss_vjp(
    ...     (0.0, 0.0, 1.0), np.ones((5, 8)), prior
    ... )
    >>> slope.shape, forward.weight_in.shape
    ((5, 8), (256, 8))
    """
    if not isinstance(prior, MLPPrior):
        raise TypeError(f"`prior` must be an MLPPrior, got {type(prior).__name__}")
    given, _, sizes = _parts(merged)
    names = [f"gradient.{name}" for name in AlignmentLoss._fields]
    leave, tokens, num_groups, sizes, *slopes = enter(
        merged=given,
        num_groups=num_groups,
        sizes=sizes,
        **dict(zip(names, _three(gradient), strict=True)),
    )
    check_tokens(tokens, "merged")
    prior._check_width("merged", tokens)
    counts = _counts(tokens, num_groups, sizes)
    ahead, behind, total = (
        check_gradient(slope, tokens.shape[:-2], "B", tokens, name).astype(np.float64)
        for name, slope in zip(names, slopes, strict=True)
    )
    find = _alignment_loss_vjp_reference
    if _cuda.is_cuda(tokens):
        find = _alignment_loss_vjp_cuda
    each = ahead + total, behind + total
    by_merged, by_weights = find(each, tokens, prior, counts)
    forward, backward = (MLP(*map(leave, weights)) for weights in by_weights)
    return leave(by_merged), (forward, backward)


def _three(gradient: Any) -> tuple[Any, Any, Any]:
    try:
        forward, backward, total = gradient
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`gradient` must be three, of the losses forward, backward and total: "
            f"{error}"
        ) from None
    return forward, backward, total


def _alignment_loss_vjp_reference(
    gradients: tuple[Any, Any],
    merged: NDArray[Any],
    prior: MLPPrior,
    counts: NDArray[np.int64],
) -> tuple[NDArray[Any], list[MLP]]:
    num_groups, dim = merged.shape[-2:]
    dtype = np.result_type(merged.dtype, np.float32)
    ahead, behind = np.s_[..., 1:, :], np.s_[..., :-1, :]
    valid = counts[..., None, None] > np.arange(num_groups)[:, None]  # (B, K, 1)
    known = valid[ahead]  # (B, K - 1, 1)
    by_merged, by_weights = np.zeros(merged.shape), []
    for reverse, gradient in enumerate(gradients):
        network = prior.backward if reverse else prior.forward
        network = MLP(*(w.astype(dtype, copy=False) for w in network))
        context = _running_mean(merged, counts, bool(reverse))
        context = np.where(valid, context, 0).astype(dtype)
        hidden = np.maximum(context @ network.weight_in.T + network.bias_in, 0)
        slope = hidden @ network.weight_out.T + network.bias_out  # the predictions yet
        read, wanted = (ahead, behind) if reverse else (behind, ahead)
        scale = 2 * gradient / (dim * np.maximum(counts - 1, 1))
        gap = np.where(known, slope[read] - merged[wanted], 0)
        slope[...] = 0
        slope[read] = gap * np.asarray(scale)[..., None, None]
        by_merged[wanted] -= slope[read]

        flat = (x.reshape(-1, x.shape[-1]) for x in (context, hidden, slope))
        weights, back = back_propagate(network, *flat)
        by_weights.append(weights)
        by_context = (back @ network.weight_in).reshape(merged.shape)
        by_merged += _running_mean_vjp_reference(by_context, counts, bool(reverse))
    return by_merged.astype(merged.dtype), by_weights


def _running_mean_vjp_reference(
    gradient: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    """Return the sum, for every token, of the gradients of the means it is part of."""
    place = np.arange(gradient.shape[-2])[:, None]  # (K, 1)
    valid = counts[..., None, None] > place
    total = np.where(valid, gradient, 0).astype(np.float64)
    if reverse:
        total /= np.maximum(counts[..., None, None] - place, 1)
        _sum_rows(total)
    else:
        total /= place + 1
        _sum_rows(total[..., ::-1, :])
    return np.where(valid, total, 0)


def _alignment_loss_vjp_cuda(
    gradients: tuple[Any, Any], merged: Any, prior: MLPPrior, counts: NDArray[np.int64]
) -> tuple[Any, list[MLP]]:
    num_groups, dim = merged.shape[-2:]
    batch, kind = math.prod(merged.shape[:-2]), _cuda.accumulation(merged.dtype)
    merged, (each, _) = _cuda.contiguous(merged), _cuda.counts(counts)
    sizes = batch, num_groups, dim
    means, slopes, by_weights = [], [], []
    for reverse, gradient in enumerate(gradients):
        network = prior._copy_beside(merged, bool(reverse))
        context = _running_mean_cuda(merged, counts, bool(reverse))
        hidden = linear(context, *network[:2], activation="relu")
        prediction = linear(hidden, *network[2:])
        slope = _cuda.empty(merged.shape, kind)
        gradient = _cuda.contiguous(gradient.reshape(-1), kind)  # (B,)
        args = (prediction, merged, each, gradient, *sizes, reverse, slope)
        kernel = "basic/alignment_vjp", "prediction_slopes"
        _cuda.launch(*kernel, merged.dtype, slope.size, args)

        layer = slope, hidden, network.weight_out
        back, *second = _linear_vjp_cuda(*layer, rectified=True)
        by_context, *first = _linear_vjp_cuda(back, context, network.weight_in)
        by_weights.append(MLP(*first, *second))
        means.append(_running_mean_vjp_cuda(by_context, each, reverse))
        slopes.append(slope)
    out = _cuda.empty(merged.shape, merged.dtype)
    args = (*means, *slopes, *sizes, out)
    kernel = "basic/alignment_vjp", "alignment_loss_vjp"
    _cuda.launch(*kernel, merged.dtype, out.size, args)
    return out, by_weights


def _running_mean_vjp_cuda(gradient: Any, counts: Any, reverse: int) -> Any:
    num_groups, dim = gradient.shape[-2:]
    batch = math.prod(gradient.shape[:-2])
    out = _cuda.empty(gradient.shape, gradient.dtype)
    chosen = _cuda.implementation()
    columns = dim if chosen == "basic" else -(-dim // _cuda.WARP) * _cuda.BLOCK
    args = (gradient, counts, batch, num_groups, dim, reverse, out)
    kernel = f"{chosen}/alignment_vjp", "prefix_means_vjp"
    _cuda.launch(*kernel, gradient.dtype, batch * columns, args)
    return out


def _linear_vjp_cuda(
    gradient: Any, x: Any, weight: Any, *, rectified: bool = False
) -> tuple[Any, Any, Any]:
    """Return the gradients of x (..., in), weight (out, in) and bias of a layer.

    `rectified`: a ReLU gave x, and its gradient is that of what the ReLU was given.
    """
    find = _linear_vjp_optimized
    if _cuda.implementation() == "basic":
        find = _linear_vjp_basic
    return find(gradient, x, weight, x if rectified else None)


def _linear_vjp_basic(
    gradient: Any, x: Any, weight: Any, gate: Any
) -> tuple[Any, Any, Any]:
    (out_dim, in_dim), rows = weight.shape, math.prod(x.shape[:-1])
    kind, file = x.dtype, "basic/alignment_vjp"
    by_x, by_weight = _cuda.empty(x.shape, kind), _cuda.empty(weight.shape, kind)
    by_bias = _cuda.empty((out_dim,), kind)
    args: tuple[Any, ...] = (gradient, weight, gate, rows, in_dim, out_dim, by_x)
    _cuda.launch(file, "linear_vjp", kind, by_x.size, args)
    args = (gradient, x, rows, in_dim, out_dim, by_weight)
    _cuda.launch(file, "weight_vjp", kind, by_weight.size, args)
    args = (gradient, rows, out_dim, by_bias)
    _cuda.launch(file, "bias_vjp", kind, by_bias.size, args)
    return by_x, by_weight, by_bias


def _linear_vjp_optimized(
    gradient: Any, x: Any, weight: Any, gate: Any
) -> tuple[Any, Any, Any]:
    out_dim, rows = len(weight), math.prod(x.shape[:-1])
    across = _transposed_cuda(weight, out_dim)  # (1, in, out)
    by_x = _products_cuda(gradient.reshape(1, rows, out_dim), across, gate)
    parts = min(max(-(-rows // _PART_ROWS), 1), _MOST_PARTS)
    part = -(-max(rows, 1) // parts)
    part = -(-part // _cuda.WARP) * _cuda.WARP  # rows of whole vectors of 16 bytes
    turned = _transposed_cuda(gradient, part)  # (S, out, part)
    by_weight = _products_cuda(turned, _transposed_cuda(x, part))  # (S, out, in)
    file, num_parts, kind = "optimized/alignment_vjp", len(turned), x.dtype
    args: tuple[Any, ...]
    if num_parts > 1:
        each, by_weight = by_weight, _cuda.empty(weight.shape, kind)
        args = (each, num_parts, by_weight.size, by_weight)
        _cuda.launch(file, "sum_parts", kind, by_weight.size, args)
    by_bias = _cuda.empty((out_dim,), kind)
    args = (turned, num_parts, out_dim, part, by_bias)
    _cuda.launch(file, "bias_vjp", kind, out_dim * _cuda.WARP, args)
    return by_x.reshape(x.shape), by_weight.reshape(weight.shape), by_bias


def _transposed_cuda(x: Any, part: int) -> Any:
    """Return x (..., columns) as (S, columns, part): `part` rows a time, then zeros."""
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_parts = max(-(-rows // part), 1)
    out = _cuda.empty((num_parts, columns, part), x.dtype)
    tiles = num_parts * -(-columns // _cuda.WARP) * -(-part // _cuda.WARP)
    args = (x, rows, columns, part, num_parts, out)
    kernel = "optimized/alignment_vjp", "transpose"
    _cuda.launch(*kernel, x.dtype, tiles * _cuda.BLOCK, args)
    return out


def _products_cuda(a: Any, b: Any, gate: Any = None) -> Any:
    """Return A Bᵀ of every part: (S, rows, columns); 0 where the gate is not above."""
    (num_parts, rows, dim), columns = a.shape, b.shape[-2]
    out = _cuda.empty((num_parts, rows, columns), a.dtype)
    tiles = num_parts * -(-rows // _cuda.TILE) * -(-columns // _cuda.TILE)
    args = (a, b, gate, rows, columns, dim, out)
    kernel = "optimized/alignment_vjp", "products"
    _cuda.launch(*kernel, a.dtype, tiles * _cuda.BLOCK, args)
    return out
