"""Fidelity loss: the reconstruction error above the norm-mass bound.

X is the matrix of a sequence's tokens, and X̂ is the matrix of the tokens rebuilt from
the merged tokens. The error of sequence b of B is e_b = ‖X - X̂‖² / ‖X‖². The norm mass
is the sum of the L2 norms of tokens, and γ is the fraction of the norm mass of X that
the merged tokens should retain. The bound on an error is (1 - γ)².
"""

from typing import Any

import numpy as np

from ...arrays.checks import check_gradient, check_number
from ...arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    IntArray,
    on_callers_stream,
)
from ...autodiff.dispatch import operation
from .reconstruction_error import (
    compute_reconstruction_error,
    compute_reconstruction_error_vjp,
    convert_and_check,
)


@operation(
    differentiable=("tokens", "merged"),
    constants=("labels?", "mask?"),
    count_parameter="num_groups?",
    options=("float gamma",),
    dtype="computed",  # float64 for float64, else float32
    shapes=lambda *_: ((),),
)
def fidelity_loss(
    tokens: Array,
    merged: Array,
    *,
    labels: IntArray | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: BoolArray | None = None,
) -> Array:
    r"""Return the mean excess of the reconstruction errors over the norm-mass bound.

    For each sequence b, X is the matrix of its tokens, and :math:`\hat X` holds the
    tokens that are rebuilt from the merged tokens. The mean is over the batch.

    .. math:: \operatorname{mean}_b \max\bigl(0,
        \lVert X - \hat X \rVert^2 / \lVert X \rVert^2 - (1 - \gamma)^2\bigr)

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        As in `reconstruction_error`.
    gamma : float, default 0.8
        Fraction γ of the norm mass to retain, within [0, 1]. The bound on the error is
        (1 - γ)².
    num_groups : int or ndarray of int of shape (B,), optional
        As in `reconstruction_error`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token.

    Returns
    -------
    ndarray of shape ()
        float32, or float64 for float64 input. It is 0 if no error exceeds the bound.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a label is outside -1..K-1, or
        γ is outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> float(fidelity_loss(np.ones((4, 2)), np.ones((1, 2))))
    0.0
    """
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    convert_back, *arrays, _ = convert_and_check(
        tokens, merged, labels, num_groups, mask
    )
    error = compute_reconstruction_error(*arrays)  # (B,), relative and squared
    # The constraint is ‖X - X̂‖² ≤ (1 - γ)² ‖X‖²: tokens that retain the fraction γ of
    # the norm mass may have a relative error of 1 - γ, and e_b is squared. The bound is
    # rounded to the dtype of the errors, as in the gradient: an error at the bound has
    # no gradient.
    excess = (error - error.dtype.type((1 - gamma) ** 2)).clip(0)
    # The mean over the B sequences. For an empty batch, `max` makes it 0 / 1.
    return convert_back(
        excess.sum(dtype=error.dtype) / error.dtype.type(max(error.size, 1))
    )


@on_callers_stream
def fidelity_loss_vjp(
    gradient: FloatArray,
    tokens: Array,
    merged: Array,
    *,
    labels: IntArray | None = None,
    gamma: float = 0.8,
    num_groups: Any = None,
    mask: BoolArray | None = None,
) -> tuple[Array, Array]:
    r"""Return the gradients of `fidelity_loss` for the tokens and the merged tokens.

    If the error of a sequence exceeds the bound :math:`(1 - \gamma)^2`, its gradients
    are the gradients of `reconstruction_error`, divided by the number of sequences. If
    the error is below or at the bound, its gradients are 0.

    Parameters
    ----------
    gradient : ndarray of shape (), or float
        Gradient of another loss with respect to this loss; any float dtype.
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings; float16, bfloat16, float32 or float64.
    merged : ndarray of shape (K, D) or (B, K, D)
        Merged tokens of the same dtype.
    labels : ndarray of shape (N,) or (B, N), optional
        As in `reconstruction_error_vjp`.
    gamma : float, default 0.8
        Fraction γ of the norm mass to retain, within [0, 1].
    num_groups : int or ndarray of int of shape (B,), optional
        As in `reconstruction_error_vjp`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token.

    Returns
    -------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Gradient with respect to the tokens, in their dtype. It is 0 for padding and for
        a sequence of zeros.
    merged : ndarray of shape (K, D) or (B, K, D)
        Gradient with respect to the merged tokens, in their dtype. It is 0 for a
        sequence of zeros.

    Raises
    ------
    TypeError
        If a dtype does not fit.
    ValueError
        If a shape does not fit, an entry is not finite, a label is outside -1..K-1, or
        γ is outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> tokens, merged = np.array([[4.0], [0.0]]), np.array([[1.0]])
    >>> labels = np.array([0, 0])
    >>> token_gradient, _ = fidelity_loss_vjp(1.0, tokens, merged, labels=labels)
    >>> token_gradient.ravel()
    array([ 0.0625, -0.125 ])
    """
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    convert_back, tokens, merged, labels, counts, mask, gradient = convert_and_check(
        tokens, merged, labels, num_groups, mask, gradient
    )
    # The gradient becomes float64. In float16, the division by the number of sequences
    # would lose digits.
    gradient = check_gradient(gradient, (), "", tokens).astype(np.float64)
    # The loss is a mean over B sequences, so each e_b gets `gradient` / B.
    # `compute_reconstruction_error_vjp` makes it 0 if e_b does not exceed the bound.
    error_gradients = np.broadcast_to(gradient / max(counts.size, 1), counts.shape)
    args = error_gradients, tokens, merged, labels, counts, mask, (1 - gamma) ** 2
    token_gradient, merged_gradient = compute_reconstruction_error_vjp(*args)
    return convert_back(token_gradient), convert_back(merged_gradient)
