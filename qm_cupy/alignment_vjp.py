"""Vector–Jacobian product of alignment: from the gradient of its losses to its inputs.

Both networks are walked back by hand; there is no autograd engine.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import Array, enter, on_callers_stream
from ._checks import check_gradient, check_tokens
from ._fitting import back_propagate
from .alignment import AlignmentLoss, _counts, _parts
from .merging import Merged
from .mlp_prior import MLP, MLPPrior, _running_mean, _sum_rows


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
    args = (ahead + total, behind + total), tokens, prior, counts
    by_merged, by_weights = _alignment_loss_vjp_reference(*args)
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
