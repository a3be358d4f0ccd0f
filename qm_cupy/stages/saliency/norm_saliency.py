"""Saliency from the L2 norms of tokens.

There are B sequences of N tokens of width D. x_i is token i of a sequence, and
n_i = ‖x_i‖ is its norm. The saliencies are the norms of a sequence, min–max scaled to
[0, 1] (min_max.py). The vector–Jacobian product is the gradient of a loss ℒ with
respect to the tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient, check_tokens
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ...arrays.dtypes import narrow
from ...arrays.finite import of_finite_gradient
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import without_last_axis
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch
from .min_max import scale_min_max, scale_min_max_vjp
from .saliency import saliency_cuda, saliency_vjp_cuda
from .score_gradients import masked_gradient
from .token_norms import relative_norms, token_norms_cuda, unpadded_tokens


@operation(
    differentiable=("tokens",),
    constants=("mask?",),
    dtype="computed",  # float64 for float64, else float32
    shapes=without_last_axis,
)
def norm_saliency(tokens: Array, *, mask: BoolArray | None = None) -> Array:
    """Return the L2 norm of each token, min–max scaled over its sequence.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = token. Padded tokens have saliency 0. They do not count for the
        minimum and the maximum, and their values are not read.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Saliency within [0, 1]; float32, or float64 for float64 input. If all norms of a
        sequence are equal, its saliency is 0.

    Raises
    ------
    TypeError
        If `tokens` is not floating or `mask` is neither boolean nor integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> norm_saliency(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]]))
    array([0.5, 0. , 1. ])
    """
    convert_back, tokens, mask = convert_inputs({"tokens": tokens, "mask": mask})
    mask = check_tokens(tokens, mask=mask)
    if is_cuda(tokens):
        norms = token_norms_cuda(tokens, mask)  # (B, N)
        # `saliency_cuda` scales entropies. With "high" it does min–max scaling alone;
        # "low" would return 1 minus the scaled values.
        return convert_back(saliency_cuda(norms, "high", mask))
    return convert_back(_norm_saliency_reference(tokens, mask))


def _norm_saliency_reference(
    tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    # Min–max scaling removes any common factor of the norms of a sequence, so norms
    # relative to the largest absolute value of the sequence are enough.
    scaled = scale_min_max(relative_norms(tokens, mask), mask)
    return scaled.astype(np.result_type(tokens.dtype, np.float32))


@on_callers_stream
def norm_saliency_vjp(
    gradient: FloatArray, tokens: Array, *, mask: BoolArray | None = None
) -> Array:
    r"""Return the vector–Jacobian product of `norm_saliency`.

    .. math:: \frac{\partial \mathcal{L}}{\partial x_i} =
        \frac{\partial \mathcal{L}}{\partial n_i} \frac{x_i}{n_i}, \qquad
        n_i = \lVert x_i \rVert

    The gradient with respect to the norms is the result of `saliency_vjp` for the norms
    instead of entropies, with ``salient="high"``.

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient of a loss with respect to the saliency; any float dtype.
    tokens : ndarray of shape (N, D) or (B, N, D)
        The argument of `norm_saliency`.
    mask : ndarray of shape (N,) or (B, N), optional
        The argument of `norm_saliency`. The gradient of padded tokens is not read.

    Returns
    -------
    ndarray of the shape and dtype of `tokens`
        Gradient of the loss with respect to the tokens; 0 for padded tokens.

    Raises
    ------
    TypeError
        If `gradient` or `tokens` is not floating, or `mask` is neither boolean nor
        integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    Notes
    -----
    Min–max scaling has no gradient at a tie, and this function returns a subgradient:
    tokens that tie at the least or the greatest norm get equal parts. If all norms of a
    sequence are equal, its gradient is 0. The gradient of a token of norm 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> tokens = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 10.0]])
    >>> norm_saliency_vjp(np.array([-1.0, 0.0, 0.0]), tokens)
    array([[-0.06, -0.08],
           [ 0.  ,  0.  ],
           [ 0.  ,  0.05]])
    """
    convert_back, tokens, mask, gradient = convert_inputs(
        {"tokens": tokens, "mask": mask}, gradients={"gradient": gradient}
    )
    mask = check_tokens(tokens, mask=mask)
    # The gradient of padded tokens may be NaN.
    check_gradient(gradient, tokens.shape[:-1], "BN", mask=mask)
    if is_cuda(tokens):
        return convert_back(_norm_saliency_vjp_cuda(gradient, tokens, mask))
    return convert_back(_norm_saliency_vjp_reference(gradient, tokens, mask))


def _norm_saliency_vjp_reference(
    gradient: NDArray[Any], tokens: NDArray[Any], mask: NDArray[np.bool_] | None
) -> NDArray[Any]:
    x = unpadded_tokens(tokens, mask)
    # Divide a sequence by its largest absolute value. Then no square overflows, and the
    # largest square is 1.
    largest = np.abs(x).max(axis=(-2, -1), keepdims=True)  # (B, 1, 1)
    largest = np.where(largest > 0, largest, 1)
    x /= largest
    # The largest absolute value is 1 now, so `relative_norms` does not change the scale
    # again.
    norms = relative_norms(x)  # n, (B, N)

    def vjp(gradient: NDArray[Any]) -> NDArray[Any]:
        norm_gradient = scale_min_max_vjp(gradient, norms, mask)  # ∂ℒ/∂n, (B, N)
        # ∂ℒ/∂x = ∂ℒ/∂n · x / n. The gradient of a token of norm 0 is 0.
        slope = norm_gradient / np.where(norms > 0, norms, 1)
        # The saliency does not change with `largest`, which counts as a constant, so
        # ∂x/∂tokens = 1 / largest. If a tiny divisor gives inf, this is right.
        return x * slope[..., None] / largest

    gradient = masked_gradient(gradient, x.dtype, mask)
    return narrow(of_finite_gradient(vjp, gradient), tokens.dtype)


def _norm_saliency_vjp_cuda(gradient: Any, tokens: Any, mask: Any) -> Any:
    """Return the gradient with respect to the tokens."""
    norms = token_norms_cuda(tokens, mask)  # (B, N)
    norm_gradient = saliency_vjp_cuda(gradient, norms, "high", mask)  # ∂ℒ/∂n, (B, N)
    out = empty(tokens.shape, tokens.dtype)
    tokens = contiguous(tokens)
    # ∂ℒ/∂x = ∂ℒ/∂n · x / n
    args = (norm_gradient, tokens, norms, norms.size, tokens.shape[-1], out)
    # This kernel is elementwise, so it has only a basic version: a thread for each
    # element.
    kernel = "norm_saliency_vjp", "token_norms_vjp"
    launch(*kernel, out.dtype, args, outputs=out.size)
    return out
