"""Alignment: how well an autoregressive prior predicts the merged tokens."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient, check_shape, check_tokens
from ...arrays.conversion import Array, enter, on_callers_stream
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import (
    beside,
    composition,
    of_framework,
    operation,
    tracing_framework,
)
from ...cuda.device import empty
from ...cuda.launch import contiguous, device_counts, launch
from ...priors.linear import linear, linear_vjp_cuda
from ...priors.merged_tokens import group_counts, merged_parts
from ...priors.mlp import MLP, back_propagate, check_width
from ...priors.mlp_prior import MLPPrior, network_beside
from ...priors.protocols import Prior, TwoLayerPrior
from ...priors.running_mean import (
    running_mean,
    running_mean_vjp_cuda,
    running_mean_vjp_reference,
)
from ...results import AlignmentLoss, Merged

# "forward_weight_in", …, "backward_bias_out": the weights as inputs of an operation.
_WEIGHTS = tuple(
    f"{direction}_{name}"
    for direction in ("forward", "backward")
    for name in MLP._fields
)


@composition
def alignment_loss(
    merged: Any, prior: Prior | TwoLayerPrior, *, num_groups: Any = None
) -> AlignmentLoss[Any]:
    r"""Bidirectional autoregressive loss of merged tokens under a prior.

    .. math:: L_{AR} = \frac{1}{K-1} \sum_{t=1}^{K-1} \operatorname{MSE}\bigl(
        f(\bar x_{1..t}), \tilde x_{t+1}\bigr) + \frac{1}{K-1} \sum_{t=2}^{K}
        \operatorname{MSE}\bigl(g(\bar x_{t..K}), \tilde x_{t-1}\bigr)

    Parameters
    ----------
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        The result of `quickmerge`, or merged tokens alone; float16, bfloat16, float32
        or float64. The prior may also read the positions and sizes of a `Merged`.
    prior : Prior
        `MLPPrior`, `TransformerPrior` or your own class. Its ``predict`` returns all
        predictions at once. It receives NumPy arrays, or CuPy arrays on a GPU, even if
        `merged` belongs to another library; unknown positions and sizes are None.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence, if they differ; later groups are padding. By default, groups
        of size 0 are padding; counting them makes the CPU wait for the GPU.

    Returns
    -------
    AlignmentLoss
        ``forward``, ``backward`` and ``total`` (their sum), each of shape () or (B,);
        float32, or float64 for float64 input. 0 for K = 1.

    Raises
    ------
    TypeError
        If `merged` is not floating or `num_groups` is not integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import MLPPrior
    >>> loss = alignment_loss(np.ones((5, 8)), MLPPrior.init(8, seed=0))
    >>> bool(loss.total == loss.forward + loss.backward)
    True
    """
    tokens, positions, sizes = merged_parts(merged)
    weights = _network_weights(prior)
    if is_traced(merged, prior):
        if num_groups is None and sizes is not None:
            num_groups = (sizes > 0).sum(-1)  # a padded group has size 0
        weights = beside(tokens, weights)
        forward, backward = mlp_alignment_loss(tokens, *weights, num_groups=num_groups)
        return AlignmentLoss(forward, backward, forward + backward)
    if weights and of_framework(weights):  # weights of torch or JAX: use their values
        prior = _prior_of(*weights)
    leave, tokens, positions, sizes, num_groups = enter(
        {"merged": tokens, "positions": positions, "sizes": sizes},
        counts={"num_groups": num_groups},
    )
    check_tokens(tokens, "merged")
    counts = group_counts(tokens, num_groups, sizes)
    valid = counts if counts.ndim else int(counts)  # one sequence: a plain integer K
    known = {"num_groups": valid, "positions": positions, "sizes": sizes}
    predict: Any = getattr(prior, "predict")  # noqa: B009 (a TwoLayerPrior may lack it)
    # Row t of `after` predicts token t + 1, row t of `before` predicts token t - 1. An
    # `MLPPrior` computes all t at once: the K prefix means are the rows of one matrix,
    # so a network is two GEMMs, one for each layer, instead of a loop over t.
    after, before = predict(tokens, **known), predict(tokens, reverse=True, **known)
    check_shape("prediction", after, "BKD", tokens.shape)
    check_shape("prediction", before, "BKD", tokens.shape)
    forward, backward = _alignment_loss(tokens, after, before, counts)
    return AlignmentLoss(leave(forward), leave(backward), leave(forward + backward))


def is_traced(merged: Any, prior: Any) -> bool:
    """Whether a framework traces the tokens, or the weights of a two-layer prior.

    The predictions of any other prior have no gradient here: its weights are unknown.
    """
    weights = _network_weights(prior)
    return bool(weights) and tracing_framework((merged, *weights)) is not None


def _network_weights(prior: Any) -> tuple[Any, ...]:
    """Return the weights of a prior of two layers, in the order of `_WEIGHTS`."""
    return prior.network_weights() if hasattr(prior, "network_weights") else ()


# torch and JAX differentiate an operation with respect to arrays, so the eight weights
# of the two networks are separate inputs here, and not one `MLPPrior`.
@operation(
    inputs=("merged", *_WEIGHTS),
    counts="num_groups?",
    dtype="computed",
    shapes=lambda merged, *_: (tuple(merged.shape[:-2]),) * 2,
    results=2,
    vjp="_mlp_alignment_loss_vjp",
)
def mlp_alignment_loss(
    merged: Any,
    forward_weight_in: Any,
    forward_bias_in: Any,
    forward_weight_out: Any,
    forward_bias_out: Any,
    backward_weight_in: Any,
    backward_bias_in: Any,
    backward_weight_out: Any,
    backward_bias_out: Any,
    *,
    num_groups: Any = None,
) -> tuple[Any, Any]:
    """Return the forward and backward losses under an `MLPPrior` of these weights."""
    prior = _prior_of(
        forward_weight_in, forward_bias_in, forward_weight_out, forward_bias_out,
        backward_weight_in, backward_bias_in, backward_weight_out, backward_bias_out,
    )  # fmt: skip
    losses = alignment_loss(merged, prior, num_groups=num_groups)
    return losses.forward, losses.backward


@on_callers_stream
def _mlp_alignment_loss_vjp(
    forward: Any,
    backward: Any,
    merged: Any,
    forward_weight_in: Any,
    forward_bias_in: Any,
    forward_weight_out: Any,
    forward_bias_out: Any,
    backward_weight_in: Any,
    backward_bias_in: Any,
    backward_weight_out: Any,
    backward_bias_out: Any,
    *,
    num_groups: Any = None,
) -> tuple[Any, ...]:
    # The operation returns two losses. Their sum is computed outside it, so the
    # gradient with respect to ``total`` is 0 here.
    gradient = AlignmentLoss(forward, backward, 0 * forward)
    prior = _prior_of(
        forward_weight_in, forward_bias_in, forward_weight_out, forward_bias_out,
        backward_weight_in, backward_bias_in, backward_weight_out, backward_bias_out,
    )  # fmt: skip
    tokens, networks = alignment_loss_vjp(
        gradient, merged, prior, num_groups=num_groups
    )
    return (tokens, *networks[0], *networks[1])


def _prior_of(*weights: Any) -> MLPPrior:
    """Return the prior of these weights; 16-bit and strided weights are copied."""
    _, *arrays = enter(dict(zip(_WEIGHTS, weights, strict=True)))
    wide = [contiguous(w, accumulation_dtype(w.dtype)) for w in arrays]  # ≥ float32
    return MLPPrior(MLP(*wide[:4]), MLP(*wide[4:]))


def _alignment_loss(
    merged: Any, after: Any, before: Any, counts: NDArray[np.int64]
) -> tuple[Any, Any]:
    """Return the losses of predicting the tokens after, and the tokens before."""
    if is_cuda(merged):
        return _alignment_loss_cuda(merged, after, before, counts)
    return _alignment_loss_reference(merged, after, before, counts)


def _alignment_loss_reference(
    merged: NDArray[Any],
    after: NDArray[Any],
    before: NDArray[Any],
    counts: NDArray[np.int64],
) -> tuple[NDArray[Any], NDArray[Any]]:
    # L = 1/(K - 1) Σ_t MSE(y_t, x_{t+1}); K = 1 has no pair, and the loss is 0 / 1.
    steps = np.maximum(counts - 1, 1)
    known = np.arange(1, merged.shape[-2]) < counts[..., None]  # (B, K - 1)

    def loss(prediction: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        gap = prediction - target  # (B, K - 1, D)
        error = np.einsum("...d,...d->...", gap, gap) / gap.shape[-1]  # (B, K - 1)
        # `where` skips padding, so a NaN in its predictions cannot reach the sum.
        total: NDArray[Any] = np.sum(error, axis=-1, where=known) / steps
        return np.asarray(total, dtype=gap.dtype)

    forward = loss(after[..., :-1, :], merged[..., 1:, :])
    backward = loss(before[..., 1:, :], merged[..., :-1, :])
    return forward, backward


def _alignment_loss_cuda(
    merged: Any, after: Any, before: Any, counts: NDArray[np.int64]
) -> tuple[Any, Any]:
    num_groups, dim = merged.shape[-2:]
    batch = math.prod(merged.shape[:-2])
    acc_dtype = accumulation_dtype(merged.dtype)
    merged, (valid, _) = contiguous(merged), device_counts(counts)
    losses = []
    for reverse, prediction in enumerate((after, before)):
        prediction = contiguous(prediction, acc_dtype)
        errors = empty(merged.shape[:-1], acc_dtype)  # (B, K): one MSE per token
        sizes = batch, num_groups, dim
        args: tuple[Any, ...] = (prediction, merged, valid, *sizes, reverse, errors)
        kernel = "alignment_loss", "prediction_errors"
        launch(*kernel, merged.dtype, args, rows=errors.size)
        # A second kernel adds the K errors of a sequence. It uses no atomics, so the
        # order of the float sums, and every bit of the loss, is the same in every run.
        losses.append(empty(merged.shape[:-2], acc_dtype))
        args = (errors, valid, batch, num_groups, losses[-1])
        launch("alignment_loss", "alignment_loss", acc_dtype, args, blocks=batch)
    return losses[0], losses[1]


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

    for the forward direction. :math:`c_t` is the mean of tokens 1..t, and
    :math:`\bar c_t` is its gradient, propagated back through the network f. The
    mirror image for g is added.

    Parameters
    ----------
    gradient : AlignmentLoss or tuple
        Gradients of a loss with respect to ``forward``, ``backward`` and ``total``.
        Each is an ndarray of shape () or (B,) of any float dtype. For shape (), a
        Python number also works.
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        Merged tokens, as in `alignment_loss`.
    prior : MLPPrior
        The prior. The slope of ReLU at 0 is 0.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence, if they differ, as in `alignment_loss`.

    Returns
    -------
    merged : ndarray of shape (K, D) or (B, K, D)
        Gradient of the loss with respect to the merged tokens, in their dtype. It is 0
        for padding and for K = 1.
    weights : tuple of two MLP
        Gradients of the loss with respect to the weights of ``prior.forward`` and
        ``prior.backward``, on the device of `merged`; float32, or float64 for float64
        tokens.

    Raises
    ------
    TypeError
        If `prior` is not an `MLPPrior`, `merged` or a gradient is not floating,
        `gradient` does not have three entries, or `num_groups` is not integer.
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
    tokens, _, sizes = merged_parts(merged)
    names = [f"gradient.{name}" for name in AlignmentLoss._fields]
    leave, tokens, sizes, num_groups, *slopes = enter(
        {"merged": tokens, "sizes": sizes},
        counts={"num_groups": num_groups},
        gradients=dict(zip(names, _three(gradient), strict=True)),
    )
    check_tokens(tokens, "merged")
    check_width("merged", tokens, prior.forward)
    counts = group_counts(tokens, num_groups, sizes)  # (B,)
    by_forward, by_backward, by_total = (
        check_gradient(slope, tokens.shape[:-2], "B", tokens, name).astype(np.float64)
        for name, slope in zip(names, slopes, strict=True)
    )
    # total = forward + backward, so its gradient adds to both.
    both = by_forward + by_total, by_backward + by_total
    by_merged, by_weights = _alignment_loss_vjp(both, tokens, prior, counts)
    forward, backward = (MLP(*map(leave, weights)) for weights in by_weights)
    return leave(by_merged), (forward, backward)


def _three(gradient: Any) -> tuple[Any, Any, Any]:
    try:
        forward, backward, total = gradient
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`gradient` must be a tuple of three gradients, those with respect to the "
            f"losses forward, backward and total: {error}"
        ) from None
    return forward, backward, total


def _alignment_loss_vjp(
    gradients: tuple[Any, Any], merged: Any, prior: MLPPrior, counts: NDArray[np.int64]
) -> tuple[Any, list[MLP]]:
    """Return the gradients of the tokens and of the weights of both networks."""
    if is_cuda(merged):
        return _alignment_loss_vjp_cuda(gradients, merged, prior, counts)
    return alignment_loss_vjp_reference(gradients, merged, prior, counts)


def alignment_loss_vjp_reference(
    gradients: tuple[Any, Any],
    merged: NDArray[Any],
    prior: MLPPrior,
    counts: NDArray[np.int64],
) -> tuple[NDArray[Any], list[MLP]]:
    num_groups, dim = merged.shape[-2:]
    dtype = np.result_type(merged.dtype, np.float32)
    later, earlier = np.s_[..., 1:, :], np.s_[..., :-1, :]
    valid = counts[..., None, None] > np.arange(num_groups)[:, None]  # (B, K, 1)
    known = valid[later]  # (B, K - 1, 1)
    by_merged, by_weights = np.zeros(merged.shape), []
    for reverse, gradient in enumerate(gradients):
        network = prior.backward if reverse else prior.forward
        network = MLP(*(w.astype(dtype, copy=False) for w in network))
        # Forward pass again: c_t, relu(W₁ c_t + b₁) and the prediction y_t.
        context = running_mean(merged, counts, bool(reverse))
        context = np.where(valid, context, 0).astype(dtype)  # (B, K, D)
        hidden = np.maximum(context @ network.weight_in.T + network.bias_in, 0)
        # `slope` first holds the predictions y; below, their gradient replaces them.
        slope = hidden @ network.weight_out.T + network.bias_out  # (B, K, D)
        read, wanted = (later, earlier) if reverse else (earlier, later)
        # dy_t = 2 dL / (D (K - 1)) · (y_t - x_{t+1}); 0 if row t predicts no token.
        scale = 2 * gradient / (dim * np.maximum(counts - 1, 1))
        gap = np.where(known, slope[read] - merged[wanted], 0)
        slope[...] = 0
        slope[read] = gap * np.asarray(scale)[..., None, None]
        by_merged[wanted] -= slope[read]  # a token is also the target of its neighbour

        # Both layers see all B·K contexts as rows, so each gradient is one GEMM.
        flat = (x.reshape(-1, x.shape[-1]) for x in (context, hidden, slope))
        weights, back = back_propagate(network, *flat)
        by_weights.append(weights)
        by_context = (back @ network.weight_in).reshape(merged.shape)  # dc_t
        # dx_i += Σ_{t ≥ i} dc_t / t: token i is part of the means of tokens 1..t.
        by_merged += running_mean_vjp_reference(by_context, counts, bool(reverse))
    return by_merged.astype(merged.dtype), by_weights


def _alignment_loss_vjp_cuda(
    gradients: tuple[Any, Any], merged: Any, prior: MLPPrior, counts: NDArray[np.int64]
) -> tuple[Any, list[MLP]]:
    num_groups, dim = merged.shape[-2:]
    batch, acc_dtype = math.prod(merged.shape[:-2]), accumulation_dtype(merged.dtype)
    merged, (valid, _) = contiguous(merged), device_counts(counts)
    sizes = batch, num_groups, dim
    means, slopes, by_weights = [], [], []
    for reverse, gradient in enumerate(gradients):
        network = network_beside(prior, merged, bool(reverse))
        # Forward pass again: nothing of the loss was kept.
        context = running_mean(merged, counts, bool(reverse))  # (B, K, D)
        hidden = linear(context, *network[:2], activation="relu")  # (B, K, H)
        prediction = linear(hidden, *network[2:])
        slope = empty(merged.shape, acc_dtype)
        gradient = contiguous(gradient.reshape(-1), acc_dtype)  # (B,)
        args = (prediction, merged, valid, gradient, *sizes, reverse, slope)
        kernel = "alignment_loss_vjp", "prediction_slopes"
        launch(*kernel, merged.dtype, args, outputs=slope.size)

        # Back through W₂ and the ReLU, through W₁, and through the running mean.
        layer = slope, hidden, network.weight_out
        back, *second = linear_vjp_cuda(*layer, rectified=True)  # (B, K, H)
        by_context, *first = linear_vjp_cuda(back, context, network.weight_in)
        by_weights.append(MLP(*first, *second))
        means.append(running_mean_vjp_cuda(by_context, valid, reverse))
        slopes.append(slope)
    # One kernel adds a token's four terms in float32 at least, and rounds only once.
    out = empty(merged.shape, merged.dtype)
    args = (*means, *slopes, *sizes, out)
    kernel = "alignment_loss_vjp", "alignment_loss_vjp"
    launch(*kernel, merged.dtype, args, outputs=out.size)
    return out, by_weights
