"""Merging of key-value caches: fewer entries, to which attention is almost the same.

A cache has N entries for each of H key heads, B sequences and L layers: a key k_j and a
value v_j of each token. b_j is the bias of an entry, which attention adds to its
scores: s_ij = c q_i · k_j + b_j for a query q_i. G is a group of entries, k̄ is its
merged key, and m_j is the mass of an entry. Z_i is the logarithm of Σ_j exp(s_ij).
S = L B H sequences of entries are merged separately.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..arrays.checks import check_choice, check_number
from ..arrays.conversion import (
    Array,
    BoolArray,
    FloatArray,
    IntArray,
    convert_inputs,
    on_callers_stream,
)
from ..arrays.counts import GroupCounts
from ..arrays.dtypes import bfloat16_as_int16, zero_where_absent
from ..arrays.protect import split_positions
from ..stages.merging.groups import compute_group_positions
from .budgets import head_budgets
from .cache_checks import (
    Rotary,
    check_attention,
    check_bias,
    check_cache,
    check_cache_values,
    check_count,
    check_flag,
    check_queries,
    check_rotary,
    check_window,
)
from .cache_entries import (
    entry_positions,
    free_entries,
    num_present,
    present_entries,
)
from .cache_features import MAX_QUERIES, grouping_features, head_weights
from .cache_groups import Cut, group_entries
from .cache_mass import (
    cache_mass,
    last_queries,
    mean_of_heads,
    queries_after,
    received_of_all,
    received_of_last,
    select_queries,
)
from .cache_plan import (
    Plan,
    calibrated_bias,
    rotated_means,
    summed_bias,
    unrotated,
)
from .kv_cache import KVCache
from .layer_axis import fold_layers, unfold_layers

RotateAt = Literal["mean", "first", "last"]
WINDOW = 128  # entries that are compared with each other, at most
_LINKAGE_POWER = 0.7  # of the masses, where they decide what is grouped
_POWER_AGAIN = 1.0  # the same for the queries of a second reading


class Options(NamedTuple):
    """Checked options of `merge_kv_cache`."""

    rotary: Rotary | None
    calibrate: bool
    scale: float
    causal: bool
    rotate_at: str
    window: int


@on_callers_stream
def merge_kv_cache(
    keys: Array,
    values: Array,
    budget: Any = None,
    *,
    max_error: float | None = None,
    query: Array | None = None,
    causal: bool = True,
    attention: FloatArray | None = None,
    positions: IntArray | None = None,
    inv_freq: Any = None,
    interleaved: bool = False,
    rotary_scaling: float = 1.0,
    bias: FloatArray | None = None,
    calibrate: bool = True,
    scale: float | None = None,
    rotate_at: RotateAt = "mean",
    protect: Any = None,
    sinks: int = 4,
    recent: int | None = None,
    per_head: bool = False,
    per_layer: bool = False,
    window: int = WINDOW,
    mask: BoolArray | None = None,
) -> KVCache[Array]:
    r"""Merge the entries of a key-value cache, so that attention hardly changes.

    Entries with similar keys become one entry: the means of their keys and of their
    values, weighted by the attention that they receive. A bias for each merged entry
    replaces the attention to its members.

    Parameters
    ----------
    keys : ndarray of shape (N, d), (B, N, d), (B, H, N, d) or (L, B, H, N, d)
        Keys as attention reads them: rotated, if the model rotates them.
    values : ndarray of shape (..., N, d_v)
        Values, of the leading axes and the dtype of `keys`.
    budget : number or ndarray of int, optional
        Entries that remain of each head: an integer K, a fraction within (0, 1] of the
        entries that are not padding, or integers that broadcast to the leading axes of
        `keys`, such as (H,) or (L, 1, 1). Results are padded to the largest K.
    max_error : float, optional
        Instead of a budget: the largest squared error of the vectors by which entries
        are grouped (see Notes), relative to their squared norms, weighted by mass.
    query : ndarray of shape (..., T, d), optional
        Queries of the last T ≤ N entries, rotated like the keys, of H or a multiple of
        H heads. The attention of the last 32 of them is a part of the mass, and
        calibrates the bias; the last 256 compare heads and layers. If T = N, and
        `attention` is not passed, all queries are used for `attention`.
    causal : bool, default True
        Whether `query` are those of the last entries. With False, they are any others,
        such as those of a second reading of the text: each attends to all entries, and
        T may be any number.
    attention : ndarray of shape (..., N), optional
        Attention that each entry receives, such as the result of `score_keys`, or of
        `attention_received` with ``causal=True``, of H or a multiple of H heads.
    positions : ndarray of int of shape (N,), (B, N) or (..., N), optional
        Positions by which the keys were rotated, or those of a merged cache; by default
        0..N-1.
    inv_freq : sequence of float of shape (r / 2,), optional
        Angles of the rotation for one position (RoPE), in radians: a model's
        ``rotary_emb.inv_freq``. The first r ≤ d elements of a key are rotated. With it,
        keys are compared as they were before the rotation. Without it, they are
        compared as they are.
    interleaved : bool, default False
        Whether elements (2i, 2i + 1) are a pair, instead of (i, i + r/2).
    rotary_scaling : float, default 1
        A factor of rotated keys: a model's ``rotary_emb.attention_scaling`` (yarn).
    bias : ndarray of shape (..., N), optional
        Bias b of the entries, from an earlier merge; 0 by default. An entry with bias
        -inf is padding.
    calibrate : bool, default True
        Whether the bias of merged entries is fitted to the last queries, if there are
        any. Otherwise it is :math:`\log \sum_{j \in G} e^{b_j}`, which is log n for n
        entries without bias.
    scale : float, optional
        The factor c > 0 of the scores, 1/√d by default.
    rotate_at : {"mean", "first", "last"}, default "mean"
        "mean": merged keys are means of rotated keys. "first" and "last": they are
        means of the keys before the rotation, rotated to the position of the first or
        the last member; these need `inv_freq`. "mean" predicts the next tokens best.
    protect : ndarray of shape (N,) or (B, N), or sequence of int, optional
        Entries that do not merge: booleans, or positions in the cache. K counts them.
    sinks : int, default 4
        Number of first entries that do not merge, the attention sinks.
    recent : int, optional
        Number of last entries that do not merge; by default a third of K, or 32 if this
        is more (half of K, if K < 64). With ``causal=False``, an eighth of K, or 8 if
        this is more (half of K, if K < 16).
    per_head : bool, default False
        If True, the budget is the mean of the heads of a layer, and heads in which
        merging changes less keep fewer entries. Results are padded to the largest K.
    per_layer : bool, default False
        If True, the budget is the mean of the layers, and layers in which merging
        changes less keep fewer entries. `keys` must have the axis of layers. The heads
        of a layer keep equally many entries, unless `per_head` is True, too. Results
        are padded to the largest K: take ``x[layer, ..., :K, :]`` of each layer.
    window : int, default 128
        Largest number of entries that are compared with each other. More entries are
        first divided into parts of similar keys.
    mask : ndarray of shape (N,) or (B, N), optional
        True or 1 = entry. Padding is not read, and is in no group.

    Returns
    -------
    KVCache
        Keys, values, bias, labels, sizes and positions of the merged entries, in the
        order of their last members. Entries that do not merge stay as they are.

    Raises
    ------
    TypeError
        If a dtype is wrong or differs from that of `keys`.
    ValueError
        If a shape or a value does not fit, not exactly one of `budget` and `max_error`
        is given, or the budget is too small for the entries that do not merge.

    See Also
    --------
    attend : Attention with a bias for each key.
    evict : Keep some entries, and drop the others.

    Notes
    -----
    The mass is :math:`m_j = (a_j / \bar a + r_j / \bar r + 0.04)\,|v_j|`, where a is
    the attention of the last 32 queries, r is `attention`, and a bar is the mean over
    the entries that may merge. A term that is not known is left out; without both,
    :math:`m_j = e^{b_j} |v_j|`. Entries are grouped by ward linkage with Euclidean
    distances and the masses :math:`m_j^{0.7}`. Their vectors are the keys, followed by
    the values times a factor, with which they vary half as much as the keys do. Time
    and memory are linear in N.

    If several heads or layers have one budget, and queries are known, the elements of
    keys are multiplied by the root mean square of those of the last 256 queries, which
    are averaged over rotated pairs. The masses of a head are multiplied by
    :math:`\sum_j a_j |q|^2` over the entries that may merge. Then the lowest merges of
    all these heads are made.

    Questions about single facts need the entries to which some query pays much
    attention, and not those to which many pay a little. So with ``causal=False``, the
    masses of the linkage are :math:`m_j`, and with `attention` too, those of a head are
    multiplied by :math:`\sum_j \sqrt{a_j r_j}\,|q|^2`.

    The calibrated bias is

    .. math:: \bar b_G = \log \frac{\sum_i \sum_{j \in G} e^{s_{ij} - Z_i}}
        {\sum_i e^{c\,q_i \cdot \bar k - Z_i}}

    over the last queries i that may attend to all entries that merge. It differs from
    :math:`\log \sum_{j \in G} e^{b_j}` by at most 3. On a GPU, the CPU
    waits for the heights of the merges, which decide how many entries of each window
    remain.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    >>> cache = merge_kv_cache(keys, keys, 3, sinks=0, recent=1)
    >>> cache.keys
    array([[0., 2.],
           [1., 0.],
           [0., 1.]])
    >>> cache.bias.round(4)  # the second entry stands for two
    array([0.    , 0.6931, 0.    ])
    """
    flags, protected = split_positions(protect)
    converted = convert_inputs(
        {
            "keys": keys,
            "values": values,
            "query": query,
            "attention": attention,
            "positions": positions,
            "bias": bias,
            "protect": flags,
            "mask": mask,
        },
        counts={"budget": budget, "inv_freq": inv_freq, "protect": protected},
    )
    convert_back, keys, values, query, attention, positions = converted[:6]
    bias, flags, mask, budget, inv_freq, protected = converted[6:]
    if (budget is None) == (max_error is None):
        got = "none" if budget is None else "both"
        raise ValueError(f"give exactly one of `budget` and `max_error`, got {got}")
    if max_error is not None:
        max_error = check_number("max_error", max_error, 0, np.inf, "[]")
    mask = check_cache(keys, values, mask)  # (B, N)
    check_bias(bias, keys, mask)
    present = present_entries(keys, bias, mask)  # (..., N), or None
    check_cache_values(keys, values, present)
    scale = check_queries(query, keys, mask, scale, causal)
    check_attention(attention, keys, present)
    rotary = check_rotary(inv_freq, interleaved, rotary_scaling, keys.shape[-1])
    options = Options(
        rotary,
        check_flag("calibrate", calibrate),
        scale,
        bool(causal),
        check_rotate_at(rotate_at, rotary),
        check_window(window),
    )
    positions = entry_positions(positions, keys)
    pooled = check_pooled(per_head, per_layer, keys)
    counts = None  # K of each head (...)
    if budget is not None:
        total = num_present(present, keys)
        counts = head_budgets(budget, keys.shape[:-2], total, pooled)
    sources = Sources(query, attention, bias, mask, positions)
    num_layers = len(keys)
    if per_layer:  # all layers as one
        keys, values, present, counts = map(
            fold_layers, (keys, values, present, counts)
        )
        sources = sources.folded()
    heads = keys.shape[-3] if pooled else 1
    num_equal = heads // num_layers if per_layer and not per_head else 1
    free, present = free_entries(
        keys,
        present,
        (flags, protected, mask),
        check_count("sinks", sinks),
        None if recent is None else check_count("recent", recent),
        counts,
        heads,
        causal=options.causal,
    )
    counts = None if counts is None else counts.ravel()
    cut = Cut(counts, max_error, heads, num_equal)
    cache = compute_merge_kv_cache(keys, values, sources, free, present, cut, options)
    if per_layer:
        cache = KVCache(*(unfold_layers(x, num_layers) for x in cache))
    return KVCache(*map(convert_back, cache))


def check_pooled(per_head: Any, per_layer: Any, keys: Any) -> tuple[int, ...]:
    """Return the leading axes of keys whose entries have a common budget, or raise."""
    check_flag("per_head", per_head)
    if not check_flag("per_layer", per_layer):
        return (-1,) if per_head and keys.ndim > 3 else ()
    if keys.ndim < 5:
        raise ValueError(
            "`per_layer=True` needs `keys` of all layers, (L, B, H, N, d), got shape "
            f"{tuple(keys.shape)}: stack the layers, or pass `per_head=True`"
        )
    return (0, -1)


def check_rotate_at(rotate_at: Any, rotary: Rotary | None) -> str:
    """Return the option, or raise if it is unknown or needs the rotation."""
    check_choice("rotate_at", rotate_at, get_args(RotateAt))
    if rotate_at != "mean" and rotary is None:
        raise ValueError(
            f'`rotate_at="{rotate_at}"` needs `inv_freq`: pass the model\'s '
            "`rotary_emb.inv_freq`"
        )
    return str(rotate_at)


class Sources(NamedTuple):
    """Converted arrays besides keys and values; each may be None."""

    query: Any  # (..., T, d)
    attention: Any  # (..., N)
    bias: Any  # (..., N)
    mask: Any  # (B, N)
    positions: Any  # (..., N), integers

    def folded(self) -> "Sources":
        """Return the arrays of all layers as those of one layer."""
        by_layer = {
            name: fold_layers(x)
            for name, x in self._asdict().items()
            if name != "mask" and getattr(x, "ndim", 0) > 2
        }
        return self._replace(**by_layer)


def compute_merge_kv_cache(
    keys: Any,
    values: Any,
    sources: Sources,
    free: Any,
    present: Any,
    cut: Cut,
    options: Options,
) -> KVCache[Any]:
    """Return the merged cache of converted and checked arrays.

    `free` and `present` (..., N) are booleans: which entries may merge, and which are
    not padding.
    """
    query, attention, bias, mask, positions = sources
    leading, num_entries = keys.shape[:-2], keys.shape[-2]
    padded = bool(mask is not None or bias is not None)
    if padded:  # padding may be NaN
        keys, values = (
            zero_where_absent(x, present[..., None]) for x in (keys, values)
        )
    last = None
    if query is not None:
        last = last_queries(query, keys, bias, mask, options.scale, options.causal)
        if attention is None and options.causal:
            attention = received_of_all(query, keys, bias, mask, options.scale)
    received: Any = None  # of the last queries, (..., N)
    if last is not None:
        received = received_of_last(last, keys, bias, mask)
    mass = cache_mass(received, attention, free, keys, values, bias)
    straight = unrotated(keys, positions, options.rotary)
    power = _LINKAGE_POWER if options.causal else _POWER_AGAIN
    linkage_mass = mass ** mass.dtype.type(power)
    comparing = None  # queries by which heads are compared
    if cut.pool_size > 1 and query is not None:
        comparing, _ = select_queries(query, keys, mask, MAX_QUERIES, options.causal)
        looked_at = received
        if attention is not None and not options.causal:
            largest = mean_of_heads(attention.astype(mass.dtype), keys)
            looked_at = np.sqrt(received) * np.sqrt(largest)
        linkage_mass = linkage_mass * head_weights(looked_at, comparing, free)
    features = grouping_features(straight, values, comparing, free, options.rotary)
    mass = mass.reshape(-1, num_entries)
    labels, counts = group_entries(
        features.reshape(-1, num_entries, features.shape[-1]),
        linkage_mass.reshape(-1, num_entries),
        free.reshape(-1, num_entries),
        present.reshape(-1, num_entries),
        cut,
        options.window,
    )
    groups = GroupCounts(counts, int(counts.max(initial=0)))
    plan = Plan(labels, groups, mass, leading)
    sizes, last_members = plan.sizes(), compute_group_positions(labels, groups)
    merged_keys, merged_values = plan.mean(keys), plan.mean(values)
    if options.rotate_at != "mean":
        rotated = rotated_means(
            plan, straight, positions, options.rotary, options.rotate_at
        )
        moved = (sizes > 1).reshape(*leading, -1, 1)
        bits = map(bfloat16_as_int16, (rotated.astype(keys.dtype), merged_keys))
        merged_keys = np.where(moved, *bits).view(keys.dtype)
    merged_bias = summed_bias(plan, bias, sizes)
    if last is not None and options.calibrate:
        after = queries_after(last, free)
        if after is not last:
            received = received_of_last(after, keys, bias, mask)
        args = after, received, merged_keys, merged_bias, sizes
        merged_bias = calibrated_bias(plan, *args)
    in_shape = (x.reshape(*leading, -1) for x in (labels, sizes, last_members))
    return KVCache(merged_keys, merged_values, merged_bias, *in_shape)
