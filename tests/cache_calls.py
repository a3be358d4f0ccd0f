"""Every public function of caches with the arguments of a call, for any kernels."""

import functools

import numpy as np

import qm_cupy as qm

BATCH, HEADS, GROUP, DIM = 2, 2, 2, 16


def join(first, second, z_first, z_second):
    """Join two parts; a flat signature, so that arrays are converted by argument."""
    return qm.join_attention([first, second], [z_first, z_second])


def kv_stream(keys, values, query):
    """Return what a stream stores of a cache that comes in three parts."""
    size = keys.shape[-2]
    stream = qm.KVStream(max(size // 3, 8), buffer=8, sinks=1, recent=4)
    # Parts that do not end where the buffer is full.
    for start, stop in ((0, 5), (5, size // 2), (size // 2, size)):
        part = (x[..., start:stop, :] for x in (keys, values, query))
        stream.append(*part)
    return stream.keys, stream.values, stream.bias, stream.sizes, stream.positions


def merge_stream(tokens):
    """Return what a stream stores of tokens that come in two parts."""
    size = tokens.shape[-2]
    stream = qm.MergeStream(max(size // 4, 3), sinks=1, recent=1)
    stream.append(tokens[..., : size // 3, :])
    stream.append(tokens[..., size // 3 :, :])
    return stream.tokens, stream.mass, stream.sizes, stream.positions


def language_model(tokens):
    """Return the logits of tokens, read at once, in parts and by a step."""
    sizes = {"num_heads": 2, "num_key_heads": 1, "mlp_dim": 24}
    # A new model, which has no copy of its weights on another stand-in of a device.
    model = qm.LanguageModel.init(50, tokens.shape[-1], **sizes)
    whole = model.predict(tokens)
    size = tokens.shape[-2]
    _, state = model.read(tokens[:, : size // 2])
    rest, state = model.read(tokens[:, size // 2 :], state, last_only=True)
    last, state = model.step(tokens[:, 0], state, size=3)
    again = model.reread(tokens, state)
    merged = again.merge(size // 2 + 1, sinks=1, recent=2)
    scores = again.attended.largest
    return whole, rest, last, state.keys, state.bias, scores, merged.keys, merged.bias


@functools.cache
def calls(num_entries=40, masked=False):
    """Return {name: (function, arguments as NumPy arrays)}."""
    rng = np.random.default_rng(num_entries)
    leading = BATCH, HEADS
    keys = rng.standard_normal((*leading, num_entries, DIM))
    values = rng.standard_normal((*leading, num_entries, 8))
    num_queries = min(num_entries, 12)
    query = rng.standard_normal((BATCH, GROUP * HEADS, num_queries, DIM))
    # The queries of all entries, which some scores need.
    every = rng.standard_normal((BATCH, GROUP * HEADS, num_entries, DIM))
    scores = rng.random((*leading, num_entries))
    bias = rng.standard_normal((*leading, num_entries))
    mask = None
    if masked:
        mask = np.ones((BATCH, num_entries), np.bool_)
        # Padding on the left of one sequence, and on the right of the other.
        mask[0, :5] = False
        mask[1, -3:] = False
    cache = {"keys": keys, "values": values, "mask": mask}
    attended = {"query": query, **cache}
    merged = {**cache, "sinks": 1, "recent": 6, "query": query}
    rotary = {"inv_freq": 1000.0 ** -(np.arange(8) / 8)}
    z = rng.standard_normal((*leading, num_entries))
    return {
        "attend": (qm.attend, {**attended, "bias": bias}),
        "attend, causal": (qm.attend, {**attended, "causal": True}),
        "join_attention": (
            join,
            # The outputs of two parts, and their log-sum-exps.
            {"first": values, "second": -values, "z_first": z, "z_second": 1 - z},
        ),
        "fold_bias": (qm.fold_bias, {"query": query, "keys": keys, "bias": bias}),
        **{
            f"score_keys, {how}": (
                qm.score_keys,
                {**attended, "how": how}
                if how == "expected"
                else {"query": every, "keys": keys, "mask": mask, "how": how},
            )
            for how in ("received", "snapkv", "expected", "rms", "last", "max")
        },
        "evict": (qm.evict, {**cache, "budget": 0.4, "scores": scores, "sinks": 1}),
        "evict, per head": (
            qm.evict,
            {**cache, "budget": 12, "scores": scores, "bias": bias, "per_head": True},
        ),
        "score_keys, other queries": (
            qm.score_keys,
            {"query": every, "keys": keys[:, :, :9], "how": "snapkv", "causal": False},
        ),
        "match_attention": (qm.match_attention, {**attended, "budget": 0.4}),
        "match_attention, other queries": (
            qm.match_attention,
            {**attended, "budget": 0.4, "causal": False},
        ),
        "merge_kv_cache": (qm.merge_kv_cache, {**merged, "budget": 0.5, **rotary}),
        "merge_kv_cache, other queries": (
            qm.merge_kv_cache,
            {
                **{**merged, "attention": scores},
                **{"budget": 0.5, "causal": False, "per_head": True},
            },
        ),
        "merge_kv_cache, windows": (
            qm.merge_kv_cache,
            # Several windows, whose lowest merges are made.
            {**merged, "budget": 14, "window": 8, "attention": scores, "bias": bias},
        ),
        "merge_kv_cache, per head": (
            qm.merge_kv_cache,
            {**merged, "budget": 0.5, **rotary, "per_head": True, "rotate_at": "first"},
        ),
        "merge_kv_cache, per layer": (
            qm.merge_kv_cache,
            # Two layers, of which the second has half as large keys.
            {
                **merged,
                **{
                    name: np.stack([x, 0.5 * x[..., ::-1]])
                    for name, x in (
                        ("keys", keys),
                        ("values", values),
                        ("query", query),
                    )
                },
                **{"budget": 0.5, **rotary, "per_layer": True},
            },
        ),
        "merge_kv_cache, error": (
            qm.merge_kv_cache,
            {**cache, "max_error": 0.4, "sinks": 0, "recent": 2},
        ),
        "KVStream": (
            kv_stream,
            {"keys": keys, "values": values, "query": every[:, ::2]},
        ),
        "LanguageModel": (language_model, {"tokens": keys[:, 0]}),
        "MergeStream": (merge_stream, {"tokens": keys[:, 0]}),
    }


NAMES = sorted(calls())
# Classes and functions of a flat signature, by the names of their calls.
FUNCTIONS = {name.split(",")[0] for name in NAMES}
