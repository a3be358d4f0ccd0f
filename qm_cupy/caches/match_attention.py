"""Attention matching: kept keys with a fitted bias and fitted values.

T queries attend to N keys k_j with the values v_j. K of the keys are kept. With the row
maxima m_i of the scores s_ij, and the sums y_i = Σ_j exp(s_ij - m_i) over all keys,
weights w_j of the kept keys are fitted, and the bias is log w_j. (Each equation is
divided by its y_i, so that every query counts equally.)

    min_w Σ_i ((M w)_i / y_i - 1)²,  M_ij = exp(s_ij - m_i),  e^-3 ≤ w_j ≤ e^3

X is the attention of the queries to the kept keys with this bias, and Y is the output
with the whole cache. The values C of the kept keys are fitted by ridge regression:

    min_C ‖X C - Y‖² + λ ‖C - V_kept‖²
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_finite_values,
    check_floating,
    check_number,
    check_shape,
)
from ..arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.dtypes import zero_where_absent
from ..arrays.libraries import is_cuda
from ..arrays.protect import split_positions
from ..arrays.shapes import expand_mask, layout_of
from ..cuda.device import to_device, to_host
from .attend import key_rows, softmax_rows, visible_keys
from .budgets import head_budgets
from .cache_checks import (
    check_bias,
    check_cache,
    check_cache_values,
    check_count,
    check_queries,
    check_query_heads,
)
from .cache_entries import free_entries, num_present, present_entries
from .evict import keep_entries, select_entries
from .kv_cache import KVCache
from .score_keys import Scored, compute_score_keys

Floats = NDArray[np.float64]

_LARGEST_SHIFT = 3.0  # of a bias
_STEPS = 200  # of the fit of the weights


@on_callers_stream
def match_attention(
    query: Array,
    keys: Array,
    values: Array,
    budget: Any,
    *,
    scores: FloatArray | None = None,
    causal: bool = True,
    bias: FloatArray | None = None,
    protect: Any = None,
    sinks: int = 0,
    recent: int = 0,
    mask: BoolArray | None = None,
    scale: float | None = None,
    ridge: float = 1e-3,
) -> KVCache[Array]:
    r"""Keep K keys of a cache, and fit their biases and values to its attention.

    Parameters
    ----------
    query : ndarray of shape (T, d), (B, T, d), (B, H, T, d) or (L, B, H, T, d)
        Queries of the last T ≤ N entries, rotated like the keys: those to which biases
        and values are fitted.
    keys : ndarray of shape (..., N, d)
        Keys of the dtype of `query`, of H heads or a number that divides H.
    values : ndarray of shape (..., N, d_v)
        Values, of the leading axes and the dtype of `keys`.
    budget : number or ndarray of int
        Entries that remain of each head, as in `evict`.
    scores : ndarray of shape (..., N), optional
        The entries with the largest scores are kept; by default those of
        ``score_keys(query, keys, how="rms")``. Any float dtype.
    causal : bool, default True
        Whether `query` are those of the last entries, so that attention is causal. With
        False, each query attends to all entries, and T may be any number.
    bias : ndarray of shape (..., N), optional
        Bias of the entries, from an earlier call; 0 by default.
    protect : ndarray of shape (N,) or (B, N), or sequence of int, optional
        Entries that remain, as in `evict`.
    sinks, recent : int, default 0
        Numbers of the first and of the last entries that remain.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = entry. Padding is not read, and never remains.
    scale : float, optional
        The factor c > 0 of the scores, 1/√d by default.
    ridge : float, default 1e-3
        Strength of the ridge regression of the values, > 0: λ is `ridge` times the
        squared norm of the attention X to the kept keys (its largest singular value is
        at most this). A larger one keeps values nearer to the original ones.

    Returns
    -------
    KVCache
        The keys that remain are unchanged, their biases and values are fitted. `sizes`
        are 1.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If a shape or a value does not fit, or the budget is too small for the entries
        that must remain.

    See Also
    --------
    merge_kv_cache : Merge entries instead.

    Notes
    -----
    The formulas are those of attention matching [1]_. They are solved in float64 on the
    CPU: arrays on a GPU are copied, and the CPU waits for them.

    References
    ----------
    .. [1] "Attention matching", arXiv:2602.16284.

    Examples
    --------
    >>> import numpy as np
    >>> import qm_cupy as qm
    >>> rng = np.random.default_rng(0)
    >>> query, keys, values = rng.standard_normal((3, 32, 4))
    >>> exact, _ = qm.attend(query[-1:], keys, values)
    >>> kept = qm.evict(keys, values, 8, scores=qm.score_keys(query, keys, how="rms"))
    >>> fitted = qm.match_attention(query, keys, values, 8)
    >>> def error(cache):
    ...     output, _ = qm.attend(query[-1:], *cache[:2], bias=cache.bias)
    ...     return np.linalg.norm(output - exact)
    >>> bool(error(fitted) < error(kept))
    True
    """
    flags, protected = split_positions(protect)
    converted = convert_inputs(
        {
            "query": query,
            "keys": keys,
            "values": values,
            "scores": scores,
            "bias": bias,
            "protect": flags,
            "mask": mask,
        },
        counts={"budget": budget, "protect": protected},
    )
    convert_back, query, keys, values, scores, bias, flags, mask = converted[:8]
    budget, protected = converted[8:]
    mask = check_cache(keys, values, mask)
    check_query_heads(query, keys)
    check_bias(bias, keys, mask)
    present = present_entries(keys, bias, mask)
    check_cache_values(keys, values, present)
    scale = check_queries(query, keys, mask, scale, causal)
    ridge = check_number("ridge", ridge, 0, np.inf, "()")
    if present is not None:  # padding may be NaN
        read = present[..., None]
        keys, values = (zero_where_absent(x, read) for x in (keys, values))
    if scores is None:
        arrays = Scored(query, keys, None, bias, mask, scale, bool(causal))
        scores = compute_score_keys(arrays, "rms")
    check_floating("scores", scores)
    axes = layout_of(keys.ndim, "Nd")[:-1]
    check_shape("scores", scores, axes, tuple(keys.shape[:-1]))
    check_finite_values("scores", scores, present)
    total = num_present(present, keys)
    counts = head_budgets(budget, keys.shape[:-2], total)
    free, present = free_entries(
        keys,
        present,
        (flags, protected, mask),
        check_count("sinks", sinks),
        check_count("recent", recent),
        np.minimum(counts + 1, total),  # all of them may have to remain
    )
    kept, counts = select_entries(scores, free, present, counts, 1)
    cache = keep_entries(keys, values, bias, kept, counts)
    arrays = Scored(query, keys, values, bias, mask, scale, bool(causal))
    fitted = _fitted(arrays, kept, cache, ridge)
    return KVCache(*map(convert_back, fitted))


class _Head(NamedTuple):
    """One key head without padding, in float64."""

    query: Floats  # (R, d), multiplied by the scale
    keys: Floats  # (n, d)
    values: Floats  # (n, d_v)
    bias: Any  # (n,), or None
    visible: NDArray[np.int64]  # (R,): how many keys each query sees
    kept: NDArray[np.intp]  # (K,): indices of the keys that remain


def _fitted(
    arrays: Scored, kept: Any, cache: KVCache[Any], ridge: float
) -> KVCache[Any]:
    """Return the cache with fitted biases and values, on the device of the input."""
    new_bias = np.array(to_host(cache.bias), order="C")
    new_values = np.array(to_host(cache.values), order="C")
    # The largest finite value of the dtype: fitted values may exceed all original ones.
    largest = np.nextafter(np.array(np.inf, new_values.dtype), new_values.dtype.type(0))
    largest = largest.astype(np.float64)
    for index, head in _heads(arrays, to_host(kept)):
        if not len(head.query):
            continue
        weights, fitted = _fit(head, ridge)
        count = len(head.kept)
        new_bias[index][:count] += np.log(weights).astype(new_bias.dtype)
        new_values[index][:count] = np.clip(fitted, -largest, largest)
    if is_cuda(cache.bias):
        new_bias, new_values = to_device(new_bias), to_device(new_values)
    return cache._replace(bias=new_bias, values=new_values)


def _heads(arrays: Scored, kept: Any) -> Iterator[tuple[tuple[int, ...], _Head]]:
    """Yield the index of each key head, and the head without padding."""
    query, keys, values, bias, mask = map(to_host, arrays[:5])
    rows = key_rows(query, keys)
    num_queries, num_entries = query.shape[-2], keys.shape[-2]
    head_mask = expand_mask(mask, keys.shape[:-1])
    for index in np.ndindex(keys.shape[:-2]):
        valid = None if head_mask is None else head_mask[index]
        unpadded = slice(None) if valid is None else valid
        visible = visible_keys(num_queries, num_entries, valid, arrays.causal)
        q = rows[index].astype(np.float64) * arrays.scale
        group = len(q) // num_queries
        # Queries of padding, which may be NaN, do not count.
        counted = np.ones(len(q), np.bool_)
        if valid is not None and arrays.causal:
            counted = np.tile(valid[num_entries - num_queries :], group)
        head = _Head(
            q[counted],
            keys[index][unpadded].astype(np.float64),
            values[index][unpadded].astype(np.float64),
            None if bias is None else bias[index][unpadded].astype(np.float64),
            np.tile(visible, group)[counted],
            np.flatnonzero(kept[index][unpadded]),
        )
        yield index, head


def _fit(head: _Head, ridge: float) -> tuple[Floats, Floats]:
    """Return the weights (K,) and the values (K, d_v) of the kept keys."""
    query, keys, values, bias, visible, kept = head
    attention, _ = softmax_rows(query, keys, bias, visible)  # (R, n)
    target = attention @ values  # Y
    part = attention[:, kept]  # M / y, (R, K)
    # Kept keys that a query does not see have no attention in this row.
    weights = _bounded_least_squares(part, np.ones(len(part)))
    own = part * weights
    total = own.sum(axis=-1, keepdims=True)
    x = own / np.where(total > 0, total, 1)  # X
    start = values[kept]
    strength = ridge * max(float((x * x).sum()), np.finfo(np.float64).tiny)
    rest = target - x @ start  # Y - X V_kept
    if len(x) < len(kept):  # (XᵀX + λ)⁻¹ Xᵀ = Xᵀ (XXᵀ + λ)⁻¹, a smaller system
        system = x @ x.T + strength * np.eye(len(x))
        return weights, start + x.T @ np.linalg.solve(system, rest)
    system = x.T @ x + strength * np.eye(len(kept))
    return weights, start + np.linalg.solve(system, x.T @ rest)


def _bounded_least_squares(matrix: Floats, target: Floats) -> Floats:
    """Return w within [e^-3, e^3] that makes ‖M w - y‖ small.

    Projected gradients with momentum, which restarts when the error grows (FISTA), from
    w = 1. The columns are scaled to norm 1, so that keys with little
    attention move too.
    """
    low, high = np.exp(-_LARGEST_SHIFT), np.exp(_LARGEST_SHIFT)
    norms = np.sqrt((matrix * matrix).sum(axis=0))
    norms = np.where(norms > 0, norms, 1)
    scaled = matrix / norms
    # The largest eigenvalue of MᵀM is at most its largest sum of a row.
    gram = np.abs(scaled.T @ scaled)
    step = 1 / max(gram.sum(axis=0).max(initial=0), 1e-300)
    w = momentum = norms.copy()  # of the scaled columns
    speed, error = 1.0, np.inf
    for _ in range(_STEPS):
        gradient = scaled.T @ (scaled @ momentum - target)
        new = np.clip(momentum - step * gradient, low * norms, high * norms)
        new_error = float(((scaled @ new - target) ** 2).sum())
        if new_error > error:
            momentum, speed = w, 1.0
            continue
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        momentum = new + (speed - 1) / faster * (new - w)
        w, speed, error = new, faster, new_error
    return w / norms
