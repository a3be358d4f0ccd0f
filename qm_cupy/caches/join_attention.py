"""Joining the attention to several parts of the keys.

Part p has the output o_p and the log-sum-exp Z_p of a query over its keys. Over all
keys, with M = max_p Z_p:

    Z = M + log Σ_p exp(Z_p - M)        o = Σ_p exp(Z_p - Z) o_p
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_finite_values, check_floating, check_shape
from ..arrays.conversion import Array, FloatArray, convert_inputs, on_callers_stream
from ..arrays.dtypes import accumulation_dtype, narrow
from ..arrays.libraries import is_cuda
from ..settings import finite_checked


def join_attention(
    outputs: Sequence[Array], log_sum_exps: Sequence[FloatArray]
) -> tuple[Array, FloatArray]:
    r"""Join the attention outputs for parts of the keys, as if for all keys at once.

    .. math:: Z = \log \sum_p e^{Z_p}, \qquad o = \sum_p e^{Z_p - Z}\,o_p

    Parameters
    ----------
    outputs : sequence of ndarray of shape (..., T, d_v)
        Outputs of `attend` of the same queries for parts of the keys, all of one shape
        and dtype.
    log_sum_exps : sequence of ndarray of shape (..., T)
        The log-sum-exps Z of these calls; -inf for a query that attends to no key of
        the part.

    Returns
    -------
    output : ndarray of shape (..., T, d_v)
        In the dtype of `outputs`; 0 for a query without keys.
    log_sum_exp : ndarray of shape (..., T)
        Z; float32, or float64 for float64 input.

    Raises
    ------
    TypeError
        If an array is not floating, or the dtypes of the outputs differ.
    ValueError
        If there is no part, the numbers of outputs and log-sum-exps differ, or a shape
        or an entry does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import attend
    >>> query, x = np.ones((1, 1)), np.array([[0.5], [1.0], [2.0]])
    >>> parts = [attend(query, part, part) for part in (x[:1], x[1:])]
    >>> output, _ = join_attention(*zip(*parts))
    >>> bool(np.allclose(output, attend(query, x, x)[0]))
    True
    """
    outputs, log_sum_exps = list(outputs), list(log_sum_exps)
    if not outputs or len(outputs) != len(log_sum_exps):
        raise ValueError(
            "`outputs` and `log_sum_exps` must have one array for each part, got "
            f"{len(outputs)} and {len(log_sum_exps)}"
        )
    return _join(*outputs, *log_sum_exps)


@on_callers_stream
def _join(*arrays: Any) -> tuple[Any, Any]:
    count = len(arrays) // 2
    names = [f"{name}[{p}]" for name in _NAMES for p in range(count)]
    convert_back, *converted = convert_inputs(dict(zip(names, arrays, strict=True)))
    outputs, parts = converted[:count], converted[count:]
    for p, (o, z) in enumerate(zip(outputs, parts, strict=True)):
        _check_part(p, o, z, outputs[0])
    joined, total = compute_join_attention(outputs, parts)
    return convert_back(joined), convert_back(total)


_NAMES = "outputs", "log_sum_exps"


def _check_part(p: int, output: Any, log_sum_exp: Any, first: Any) -> None:
    """Raise unless the arrays of part p fit those of the first part."""
    check_floating(f"outputs[{p}]", output)
    check_floating(f"log_sum_exps[{p}]", log_sum_exp)
    letters = "LBHTD"[-max(output.ndim, 2) :]
    if output.ndim < 2:
        raise ValueError(
            f"`outputs[{p}]` must have shape (..., T, d_v), got {tuple(output.shape)}"
        )
    check_shape(f"outputs[{p}]", output, letters, tuple(first.shape))
    check_shape(f"log_sum_exps[{p}]", log_sum_exp, letters[:-1], first.shape[:-1])
    if output.dtype != first.dtype:
        raise TypeError(
            f"`outputs[{p}]` must be {first.dtype} like `outputs[0]`, got "
            f"{output.dtype}"
        )
    check_finite_values(f"outputs[{p}]", output)
    if finite_checked() and not is_cuda(log_sum_exp):
        wrong = np.argwhere(~(log_sum_exp < np.inf))
        if len(wrong):
            at = tuple(map(int, wrong[0]))
            raise ValueError(
                f"`log_sum_exps[{p}]` must be finite or -inf, got {log_sum_exp[at]} at "
                f"index {at}"
            )


def compute_join_attention(
    outputs: list[NDArray[Any]], log_sum_exps: list[NDArray[Any]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return output and log-sum-exp of converted arrays; elementwise, also on a GPU."""
    dtype = np.result_type(
        *(accumulation_dtype(x.dtype) for x in (outputs[0], *log_sum_exps))
    )
    top = log_sum_exps[0].astype(dtype)
    for z in log_sum_exps[1:]:
        top = np.maximum(top, z.astype(dtype))
    # A query without keys in every part: -inf - (-inf) would be NaN.
    top = np.where(top == -np.inf, dtype.type(0), top)
    total, joined = np.zeros(top.shape, dtype, like=top), 0
    for o, z in zip(outputs, log_sum_exps, strict=True):
        weight = np.exp(z.astype(dtype) - top)
        total = total + weight
        joined = joined + weight[..., None] * o.astype(dtype)
    exists = total > 0
    divisor = np.where(exists, total, dtype.type(1))
    log_sum_exp = np.where(exists, np.log(divisor) + top, dtype.type(-np.inf))
    return narrow(joined / divisor[..., None], outputs[0].dtype), log_sum_exp
