"""Saliency mass: the weights of tokens in the merge.

For token i, s_i is the saliency, and π_i is the probability that the token is selected.
ε is the weight of background tokens, and m_i = π_i s_i + (1 - π_i) ε is the mass. A bar
means the gradient of a loss with respect to the quantity, such as m̄_i. Arrays are (N,)
or (B, N): N tokens of one sequence or of B sequences.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_gradient, check_number, check_shape, check_values
from ...arrays.conversion import Array, FloatArray, convert_inputs, on_callers_stream
from ...arrays.dtypes import accumulation_dtype, narrow
from ...arrays.finite import overflow_raises
from ...arrays.libraries import is_cuda
from ...autodiff.dispatch import operation
from ...autodiff.operations import like_first
from ...cuda.device import empty
from ...cuda.launch import contiguous, launch


@operation(
    differentiable=("saliency", "probabilities"),
    options=("float epsilon",),
    dtype="widest",  # float64 if an array is float64, else float32
    shapes=like_first,
)
def saliency_mass(
    saliency: Array, probabilities: FloatArray, *, epsilon: float = 0.01
) -> Array:
    r"""Return the merge weight of each token: its saliency if selected, otherwise ε.

    .. math:: m_i = \pi_i s_i + (1 - \pi_i)\,\varepsilon

    Parameters
    ----------
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Saliency s and selection probabilities π: soft, or K-hot (1 for the K selected
        tokens and 0 for the others).
    epsilon : float, default 0.01
        Weight ε ≥ 0 of background tokens.

    Returns
    -------
    ndarray of shape (N,) or (B, N)
        Mass; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes differ, an entry is not finite, or `epsilon` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> saliency_mass(np.array([0.8, 0.4]), np.array([1.0, 0.0]))
    array([0.8 , 0.01])
    """
    convert_back, saliency, probabilities = convert_inputs(
        {"saliency": saliency, "probabilities": probabilities}
    )
    check_values("saliency", saliency, "N", "BN")
    check_values("probabilities", probabilities, "N", "BN")
    check_shape("probabilities", probabilities, "BN", saliency.shape)
    epsilon = check_epsilon(epsilon, _mass_dtype(saliency, probabilities))
    return convert_back(compute_saliency_mass(saliency, probabilities, epsilon=epsilon))


def compute_saliency_mass(
    saliency: Any, probabilities: Any, *, epsilon: float = 0.01
) -> Any:
    """Return the mass of arrays that are already converted and checked."""
    if is_cuda(saliency):
        return _saliency_mass_cuda(saliency, probabilities, epsilon)
    return _saliency_mass_reference(saliency, probabilities, epsilon)


def check_epsilon(epsilon: Any, dtype: Any = np.float64) -> float:
    """Return ε as a float; raise if it is negative or above the range of the mass."""
    epsilon = check_number("epsilon", epsilon, 0, np.inf, "[)")
    largest = float(np.finfo(dtype).max)
    if epsilon > largest:
        raise ValueError(
            f"`epsilon` must be at most {largest:.4g}, the largest {np.dtype(dtype)}, "
            f"got {epsilon:g}"
        )
    return epsilon


def _saliency_mass_reference(
    saliency: NDArray[Any], probabilities: NDArray[Any], epsilon: float
) -> NDArray[Any]:
    dtype = _mass_dtype(saliency, probabilities)
    s, p = saliency.astype(dtype), probabilities.astype(dtype)  # p is π
    # π = 1 gives the saliency itself, and π = 0 gives the background weight ε.
    try:
        with overflow_raises():
            mass: NDArray[Any] = p * s + (1 - p) * dtype.type(epsilon)
    except FloatingPointError:
        # The mass is between s and ε, unless π is outside [0, 1].
        raise ValueError(
            f"`probabilities` must lie in [0, 1] for saliency up to {s.max():.3g} and "
            f"an epsilon of {epsilon:g}, got {p.min():.3g}..{p.max():.3g}: the mass "
            "overflows"
        ) from None
    return mass


def _mass_dtype(saliency: Any, probabilities: Any) -> np.dtype[Any]:
    """Return float64 if one of the arrays is float64, else float32."""
    # Convert to accumulation dtypes first: NumPy returns float16 for two float16
    # arrays.
    return np.result_type(
        *map(accumulation_dtype, (saliency.dtype, probabilities.dtype))
    )


def _saliency_mass_cuda(saliency: Any, probabilities: Any, epsilon: float) -> Any:
    dtype = _mass_dtype(saliency, probabilities)
    out = empty(saliency.shape, dtype)
    # The kernel is compiled for `dtype`, so it reads both inputs in this dtype.
    arrays = contiguous(saliency, dtype), contiguous(probabilities, dtype)
    args = (*arrays, out.size, epsilon, out)
    # The work is elementwise: a thread for each token.
    launch("saliency_mass", "saliency_mass", dtype, args, outputs=out.size)
    return out


@on_callers_stream
def saliency_mass_vjp(
    gradient: FloatArray,
    saliency: Array,
    probabilities: FloatArray,
    *,
    epsilon: float = 0.01,
) -> tuple[Array, Array]:
    r"""Return the gradients of `saliency_mass` for saliency and probabilities.

    .. math:: \bar s_i = \bar m_i \pi_i, \qquad
        \bar\pi_i = \bar m_i (s_i - \varepsilon)

    Parameters
    ----------
    gradient : ndarray of shape (N,) or (B, N)
        Gradient m̄ of a loss with respect to the mass; any float dtype.
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Saliency s and selection probabilities π (soft or K-hot).
    epsilon : float, default 0.01
        Weight ε ≥ 0 of background tokens.

    Returns
    -------
    saliency, probabilities : ndarray of shape (N,) or (B, N)
        Gradients of the loss with respect to the two arguments, each in the dtype of
        its argument.

    Raises
    ------
    TypeError
        If an array is not floating.
    ValueError
        If the shapes differ, an entry is not finite, or `epsilon` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> s, p = np.array([0.8, 0.4]), np.array([1.0, 0.5])
    >>> saliency_mass_vjp(np.array([1.0, 2.0]), s, p)
    (array([1., 1.]), array([0.79, 0.78]))
    """
    convert_back, saliency, probabilities, gradient = convert_inputs(
        {"saliency": saliency, "probabilities": probabilities},
        gradients={"gradient": gradient},
    )
    check_values("saliency", saliency, "N", "BN")
    check_values("probabilities", probabilities, "N", "BN")
    check_shape("probabilities", probabilities, "BN", saliency.shape)
    gradient = check_gradient(gradient, saliency.shape, "BN", saliency)
    epsilon = check_epsilon(epsilon, _mass_dtype(saliency, probabilities))
    args = gradient, saliency, probabilities, epsilon
    if is_cuda(saliency):
        s_gradient, p_gradient = _saliency_mass_vjp_cuda(*args)
    else:
        s_gradient, p_gradient = _saliency_mass_vjp_reference(*args)
    return convert_back(s_gradient), convert_back(p_gradient)


def _saliency_mass_vjp_reference(
    gradient: NDArray[Any],
    saliency: NDArray[Any],
    probabilities: NDArray[Any],
    epsilon: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    # Products in float64 are rounded once to the dtype of each argument.
    g, s, p = (x.astype(np.float64) for x in (gradient, saliency, probabilities))
    with np.errstate(over="ignore"):  # ±inf is right for a gradient out of range
        # s̄ = m̄ π and π̄ = m̄ (s - ε)
        s_gradient, p_gradient = g * p, g * (s - epsilon)
    return narrow(s_gradient, saliency.dtype), narrow(p_gradient, probabilities.dtype)


def _saliency_mass_vjp_cuda(
    gradient: Any, saliency: Any, probabilities: Any, epsilon: float
) -> tuple[Any, Any]:
    dtype = _mass_dtype(saliency, probabilities)
    # The kernel has one dtype for all arrays; results are converted back below.
    inputs = gradient, saliency, probabilities
    arrays = (contiguous(x, dtype) for x in inputs)
    # One launch writes both gradients: s̄ and π̄.
    outs = [empty(saliency.shape, dtype) for _ in range(2)]
    args = (*arrays, saliency.size, epsilon, *outs)
    kernel = "saliency_mass_vjp", "saliency_mass_vjp"
    launch(*kernel, dtype, args, outputs=saliency.size)  # a thread for each token
    s_gradient, p_gradient = outs
    # An argument may be narrower than the kernel's dtype.
    return (
        s_gradient.astype(saliency.dtype, copy=False),
        p_gradient.astype(probabilities.dtype, copy=False),
    )
