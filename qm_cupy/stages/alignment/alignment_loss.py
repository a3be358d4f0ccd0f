"""Alignment: how well an autoregressive prior predicts the merged tokens.

A prior has two networks. The network f reads the merged tokens from the left and
predicts the next one; g reads them from the right and predicts the previous one. Merged
token t of K is x̃_t, with D entries. In comments, c_t is the mean of the tokens that a
network has read when it predicts, h_t is the hidden layer of an MLP before its ReLU,
y_t is the prediction, and L is the loss. A letter d before a quantity, in names too,
means the gradient of a loss with respect to this quantity. Comments give f's formulas.
"""

import math
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient, check_tokens
from ...arrays.conversion import Array, convert_inputs, on_callers_stream
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import (
    as_constants_like,
    of_framework,
    on_callers_stream_unless_traced,
    operation,
    tracing_framework,
)
from ...cuda.device import empty
from ...cuda.launch import contiguous, counts_on_device, launch
from ...priors.linear import linear, linear_vjp_cuda
from ...priors.merged_tokens import group_counts, merged_parts
from ...priors.mlp import MLP, back_propagate, check_width
from ...priors.mlp_prior import MLPPrior, network_on_device_of
from ...priors.protocols import MergedTokens, Prior, TwoLayerPrior
from ...priors.running_mean import (
    running_mean,
    running_mean_vjp_cuda,
    running_mean_vjp_reference,
)
from .models import check_prior, has_method, network_weights, predictions

# "forward_weight_in", …, "backward_bias_out": the weights as inputs of an operation.
_WEIGHTS = tuple(
    f"{direction}_{name}"
    for direction in ("forward", "backward")
    for name in MLP._fields
)


class AlignmentLoss(NamedTuple, Generic[Array]):
    """Losses of `alignment_loss`, each of shape () or (B,)."""

    forward: Array  # each token is predicted from the tokens before it
    backward: Array  # each token is predicted from the tokens after it
    total: Array  # forward + backward


@on_callers_stream_unless_traced
def alignment_loss(
    merged: Any, prior: Prior | TwoLayerPrior, *, num_groups: Any = None
) -> AlignmentLoss[Any]:
    r"""Return the bidirectional autoregressive loss [1]_ of merged tokens.

    .. math:: L_{AR} = \frac{1}{K-1} \sum_{t=1}^{K-1} \operatorname{MSE}\bigl(
        f(\tilde x_{1..t}), \tilde x_{t+1}\bigr) + \frac{1}{K-1} \sum_{t=2}^{K}
        \operatorname{MSE}\bigl(g(\tilde x_{t..K}), \tilde x_{t-1}\bigr)

    :math:`\tilde x_1, …, \tilde x_K` are the merged tokens. The prior's networks are f,
    which predicts the next token, and g, which predicts the previous token.

    Parameters
    ----------
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        The result of `quickmerge`, or merged tokens alone; float16, bfloat16, float32
        or float64. The prior may also read the positions and sizes of a `Merged`.
    prior : Prior or TwoLayerPrior
        `MLPPrior`, `TransformerPrior` or your own class. Its ``predict`` returns all
        predictions at once. It receives NumPy arrays, or CuPy arrays on a GPU, even if
        `merged` belongs to another library, and returns an array of the same library.
        The arrays are copies, which it may change. Positions and sizes are None unless
        `merged` is a `Merged`. Only a `TwoLayerPrior` has gradients in torch and JAX;
        without ``predict``, it predicts as an `MLPPrior` of its weights.
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
        If `merged` is not floating, `num_groups` is not integer, the prior has none of
        the methods, or its prediction is not a floating array of this library.
    ValueError
        If a shape does not fit, or an entry of `merged` or of a weight is not finite.

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
    check_prior(prior)
    tokens, positions, sizes = merged_parts(merged)
    weights = network_weights(prior)
    if is_traced(merged, prior):
        if num_groups is None and sizes is not None:
            num_groups = (sizes > 0).sum(-1)  # a padded group has size 0
        # Plain arrays become constants; traced weights keep their gradients.
        weights = as_constants_like(tokens, weights)
        forward, backward = mlp_alignment_loss(tokens, *weights, num_groups=num_groups)
        return AlignmentLoss(forward, backward, forward + backward)
    # Nothing is traced, so weights of torch or JAX are used as plain arrays.
    if weights and (of_framework(weights) or not has_method(prior, "predict")):
        prior = _prior_of(*weights)
    convert_back, tokens, positions, sizes, num_groups = convert_inputs(
        {"merged": tokens, "positions": positions, "sizes": sizes},
        counts={"num_groups": num_groups},
    )
    check_tokens(tokens, "merged")
    counts = group_counts(tokens, num_groups, sizes)
    # Row t of `y_next` predicts token t + 1; row t of `y_prev` predicts token t - 1. An
    # `MLPPrior` computes all rows by two GEMMs: the K means c_t are rows of one matrix.
    y_next, y_prev = predictions(prior, tokens, counts, positions, sizes)
    forward, backward = _alignment_loss(tokens, y_next, y_prev, counts)
    return AlignmentLoss(
        convert_back(forward), convert_back(backward), convert_back(forward + backward)
    )


def is_traced(merged: Any, prior: Any) -> bool:
    """Return whether torch or JAX traces the tokens, or the weights of the prior.

    A prior without `network_weights` has no gradients here, so the result is False.
    """
    weights = network_weights(prior)
    return bool(weights) and tracing_framework((merged, *weights)) is not None


# torch and JAX differentiate an operation with respect to arrays, so the eight weights
# of the two networks are separate inputs here, and not one `MLPPrior`.
@operation(
    differentiable=("merged", *_WEIGHTS),
    count_parameter="num_groups?",
    dtype="computed",  # float64 for float64, else float32
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
    """Return both losses under an `MLPPrior` of these weights, traced or not."""
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
    # `forward` and `backward` are gradients with respect to the two losses. Their sum
    # ``total`` is computed outside the operation, so its gradient is 0 here.
    gradient = AlignmentLoss(forward, backward, 0 * forward)
    prior = _prior_of(
        forward_weight_in, forward_bias_in, forward_weight_out, forward_bias_out,
        backward_weight_in, backward_bias_in, backward_weight_out, backward_bias_out,
    )  # fmt: skip
    dx, dweights = alignment_loss_vjp(gradient, merged, prior, num_groups=num_groups)
    return (dx, *dweights[0], *dweights[1])


def _prior_of(*weights: Any) -> MLPPrior:
    """Return an `MLPPrior` of these weights; 16-bit and strided weights are copied."""
    _, *arrays = convert_inputs(dict(zip(_WEIGHTS, weights, strict=True)))
    converted = [contiguous(w, accumulation_dtype(w.dtype)) for w in arrays]
    return MLPPrior(MLP(*converted[:4]), MLP(*converted[4:]))


def _alignment_loss(
    merged: Any, y_next: Any, y_prev: Any, counts: NDArray[np.int64]
) -> tuple[Any, Any]:
    """Return the forward and backward losses (B,) of both predictions (B, K, D)."""
    if is_cuda(merged):
        return _alignment_loss_cuda(merged, y_next, y_prev, counts)
    return _alignment_loss_reference(merged, y_next, y_prev, counts)


def _alignment_loss_reference(
    merged: NDArray[Any],
    y_next: NDArray[Any],
    y_prev: NDArray[Any],
    counts: NDArray[np.int64],
) -> tuple[NDArray[Any], NDArray[Any]]:
    # L = 1 / (K - 1) Σ_t MSE(y_t, x̃_{t+1}). K = 1 has no pair, and the loss is 0 / 1.
    steps = np.maximum(counts - 1, 1)
    has_target = np.arange(1, merged.shape[-2]) < counts[..., None]  # (B, K - 1)

    def loss(prediction: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        gap = prediction - target  # (B, K - 1, D)
        error = np.einsum("...d,...d->...", gap, gap) / gap.shape[-1]  # (B, K - 1)
        # `where` skips padding: a NaN in a prediction there does not reach the sum.
        total: NDArray[Any] = np.sum(error, axis=-1, where=has_target) / steps
        return np.asarray(total, dtype=gap.dtype)

    forward = loss(y_next[..., :-1, :], merged[..., 1:, :])
    backward = loss(y_prev[..., 1:, :], merged[..., :-1, :])
    return forward, backward


def _alignment_loss_cuda(
    merged: Any, y_next: Any, y_prev: Any, counts: NDArray[np.int64]
) -> tuple[Any, Any]:
    num_groups, dim = merged.shape[-2:]
    batch = math.prod(merged.shape[:-2])
    acc_dtype = accumulation_dtype(merged.dtype)
    merged, (gpu_counts, _) = contiguous(merged), counts_on_device(counts, num_groups)
    losses = []
    for reverse, y in enumerate((y_next, y_prev)):
        y = contiguous(y, acc_dtype)
        errors = empty(merged.shape[:-1], acc_dtype)  # (B, K), one MSE for each token
        sizes = batch, num_groups, dim
        args: tuple[Any, ...] = (y, merged, gpu_counts, *sizes, reverse, errors)
        kernel = "alignment_loss", "prediction_errors"
        launch(*kernel, merged.dtype, args, rows=errors.size)
        # A second kernel adds the K errors of a sequence. It uses no atomics, so the
        # order of the float sums, and every bit of the loss, is the same in every run.
        losses.append(empty(merged.shape[:-2], acc_dtype))
        args = (errors, gpu_counts, batch, num_groups, losses[-1])
        launch("alignment_loss", "alignment_loss", acc_dtype, args, blocks=batch)
    return losses[0], losses[1]


@on_callers_stream
def alignment_loss_vjp(
    gradient: AlignmentLoss[Any] | tuple[Any, Any, Any],
    merged: Array | MergedTokens[Array],
    prior: MLPPrior,
    *,
    num_groups: Any = None,
) -> tuple[Array, tuple[MLP, MLP]]:
    r"""Return the gradients of `alignment_loss` for the tokens and for the weights.

    A bar is the gradient of a loss with respect to the quantity below it. For the
    forward direction,

    .. math:: \bar{\tilde x}_i = \sum_{t \ge i} \frac{\bar c_t}{t} - \bar y_{i-1},
        \qquad \bar y_t = \frac{2 \bar L}{D (K - 1)} \bigl(y_t - \tilde x_{t+1}\bigr),

    where :math:`c_t` is the mean of merged tokens 1..t of K, :math:`y_t` is the forward
    network's prediction from :math:`c_t`, and D is the width of a token.
    :math:`\bar c_t` is :math:`\bar y_t` propagated back through the network. The sum
    ends at K - 1, :math:`\bar y_0` is 0, and the backward network mirrors all of this.

    Parameters
    ----------
    gradient : AlignmentLoss or tuple
        Gradients of a loss with respect to ``forward``, ``backward`` and ``total``.
        Each is an ndarray of shape () or (B,) of any float dtype. For shape (), a
        Python number also works.
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        Merged tokens, as in `alignment_loss`.
    prior : MLPPrior
        The prior. The derivative of ReLU at 0 counts as 0.
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
    >>> dx, (forward, backward) = alignment_loss_vjp(
    ...     (0.0, 0.0, 1.0), np.ones((5, 8)), prior
    ... )
    >>> dx.shape, forward.weight_in.shape
    ((5, 8), (256, 8))
    """
    if not isinstance(prior, MLPPrior):
        raise TypeError(f"`prior` must be an MLPPrior, got {type(prior).__name__}")
    tokens, _, sizes = merged_parts(merged)
    names = [f"gradient.{name}" for name in AlignmentLoss._fields]
    convert_back, tokens, sizes, num_groups, *gradients = convert_inputs(
        {"merged": tokens, "sizes": sizes},
        counts={"num_groups": num_groups},
        gradients=dict(zip(names, _three(gradient), strict=True)),
    )
    check_tokens(tokens, "merged")
    check_width("merged", tokens, prior.forward)
    counts = group_counts(tokens, num_groups, sizes)  # (B,)
    forward_gradient, backward_gradient, total_gradient = (
        check_gradient(value, tokens.shape[:-2], "B", tokens, name).astype(np.float64)
        for name, value in zip(names, gradients, strict=True)
    )
    # total = forward + backward, so the gradient of the total is added to both.
    pair = forward_gradient + total_gradient, backward_gradient + total_gradient
    vjp = _alignment_loss_vjp_cuda if is_cuda(tokens) else alignment_loss_vjp_reference
    dx, dweights = vjp(pair, tokens, prior, counts)
    forward, backward = (MLP(*map(convert_back, weights)) for weights in dweights)
    return convert_back(dx), (forward, backward)


def _three(gradient: Any) -> tuple[Any, Any, Any]:
    """Return the three gradients in `gradient`; raise if there are not three."""
    try:
        forward, backward, total = gradient
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`gradient` must be a tuple of three gradients, those with respect to the "
            f"losses forward, backward and total: {error}"
        ) from None
    return forward, backward, total


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
    has_target = valid[later]  # (B, K - 1, 1)
    dx, dweights = np.zeros(merged.shape), []
    for reverse, gradient in enumerate(gradients):
        network = network_on_device_of(prior, merged, bool(reverse))
        network = MLP(*(w.astype(dtype, copy=False) for w in network))
        # Repeat the forward pass: y_t = W₂ relu(W₁ c_t + b₁) + b₂.
        context = running_mean(merged, counts, bool(reverse))
        context = np.where(valid, context, 0).astype(dtype)  # (B, K, D)
        hidden = np.maximum(context @ network.weight_in.T + network.bias_in, 0)
        prediction = hidden @ network.weight_out.T + network.bias_out  # (B, K, D)
        sources, targets = (later, earlier) if reverse else (earlier, later)
        # dy_t = 2 dL / (D (K - 1)) · (y_t - x̃_{t+1}) replaces y_t in `prediction`. It
        # is 0 if row t predicts no token.
        scale = 2 * gradient / (dim * np.maximum(counts - 1, 1))
        gap = np.where(has_target, prediction[sources] - merged[targets], 0)
        prediction[...] = 0
        prediction[sources] = gap * np.asarray(scale)[..., None, None]
        # The target of a prediction is a token too: dx̃_{t+1} -= dy_t.
        dx[targets] -= prediction[sources]

        # With all B·K means as rows of one matrix, each gradient is one GEMM.
        flat = (x.reshape(-1, x.shape[-1]) for x in (context, hidden, prediction))
        weights, dh = back_propagate(network, *flat)
        dweights.append(weights)
        # dc_t = W₁ᵀ dh_t, where h_t is the hidden layer before its ReLU.
        dc = (dh @ network.weight_in).reshape(merged.shape)
        # dx̃_i += Σ_{t ≥ i} dc_t / t: token i is part of the means of tokens 1..t.
        dx += running_mean_vjp_reference(dc, counts, bool(reverse))
    return dx.astype(merged.dtype), dweights


def _alignment_loss_vjp_cuda(
    gradients: tuple[Any, Any], merged: Any, prior: MLPPrior, counts: NDArray[np.int64]
) -> tuple[Any, list[MLP]]:
    num_groups, dim = merged.shape[-2:]
    batch, acc_dtype = math.prod(merged.shape[:-2]), accumulation_dtype(merged.dtype)
    merged, (gpu_counts, _) = contiguous(merged), counts_on_device(counts, num_groups)
    sizes = batch, num_groups, dim
    dx_of_means, dys, dweights = [], [], []
    for reverse, gradient in enumerate(gradients):
        network = network_on_device_of(prior, merged, bool(reverse))
        # Repeat the forward pass: the loss keeps no intermediate results.
        context = running_mean(merged, counts, bool(reverse))  # (B, K, D)
        hidden = linear(context, *network[:2], activation="relu")  # (B, K, H)
        y = linear(hidden, *network[2:])
        dy = empty(merged.shape, acc_dtype)
        gradient = contiguous(gradient.reshape(-1), acc_dtype)  # (B,)
        args = (y, merged, gpu_counts, gradient, *sizes, reverse, dy)
        kernel = "alignment_loss_vjp", "prediction_slopes"
        launch(*kernel, merged.dtype, args, outputs=dy.size)

        # Back through W₂ and the ReLU, through W₁, and through the running mean.
        layer = dy, hidden, network.weight_out
        dh, *second = linear_vjp_cuda(*layer, rectified=True)  # (B, K, H)
        dc, *first = linear_vjp_cuda(dh, context, network.weight_in)
        dweights.append(MLP(*first, *second))
        dx_of_means.append(running_mean_vjp_cuda(dc, gpu_counts, reverse))
        dys.append(dy)
    # The gradient of a token has four terms: in each direction, one through the means
    # and one as a target. The kernel adds them in float32 at least, and rounds once.
    out = empty(merged.shape, merged.dtype)
    args = (*dx_of_means, *dys, *sizes, out)
    kernel = "alignment_loss_vjp", "alignment_loss_vjp"
    launch(*kernel, merged.dtype, args, outputs=out.size)
    return out, dweights
