"""Calls of the functions of key-value caches at any sizes, for `launch_calls`."""

import functools

import qm_cupy as qm

# Elements of keys of calls that read sizes and heights on the host between launches;
# larger inputs are skipped.
_MAX_READ = 1 << 16
_QUERIES = 40  # queries of a call, at most


def _queries(c):
    """Return the queries of the last entries: two heads for each head of keys."""
    batch, heads, num_entries, dim = c.heads.shape
    return c.array(batch, 2 * heads, min(num_entries, _QUERIES), dim)


def _small(call):
    """Return a call that does nothing for large inputs."""

    def limited(c):
        if c.batch * c.num_tokens <= _MAX_READ // 64:
            call(c)

    return limited


def _join(c):
    parts = [c.heads, c.heads], [c.head_rows, c.head_rows]
    qm.join_attention(*parts)


def _scores(c, how):
    # Elementwise arrays of N rows for each query head: too slow for large inputs.
    # A mask without a token, which these values may be, has no softmax.
    rest = {"values": c.heads} if how == "expected" else {"mask": c.mask}
    qm.score_keys(_queries(c), c.heads, how=how, **rest)


def _evict(c):
    qm.evict(c.heads, c.heads, c.num_groups, scores=c.head_rows, mask=None)


def _merge(c):
    options = {"sinks": 0, "recent": 0, "inv_freq": [1.0, 0.1]}
    qm.merge_kv_cache(c.heads, c.heads, c.num_groups, query=_queries(c), **options)
    options = {"sinks": 0, "recent": 0, "per_head": True, "rotate_at": "last"}
    heads = c.heads
    qm.merge_kv_cache(heads, heads, max_error=0.1, inv_freq=[0.5], **options)


@functools.cache
def _language_model():
    sizes = {"num_heads": 4, "num_key_heads": 2, "mlp_dim": 40, "num_layers": 1}
    return qm.LanguageModel.init(50, 32, **sizes)


def _read(c):
    # Embeddings, which may have any value; ids are numbers of a vocabulary.
    tokens = c.array(2, c.num_tokens, 32)
    model = _language_model()
    model.predict(tokens)
    _, state = model.read(tokens, last_only=True)
    model.step(tokens[:, 0], state)


def _kv_stream(c):
    stream = qm.KVStream(8, buffer=8, sinks=1, recent=2)
    for _ in range(2):
        stream.append(c.array(2, 2, 9, 16), c.array(2, 2, 9, 8))


def _merge_stream(c):
    stream = qm.MergeStream(8, buffer=4, sinks=1)
    stream.append(c.array(2, 20, 16))


CACHE_OPERATIONS = {
    "attend": lambda c: qm.attend(_queries(c), c.heads, c.heads, bias=c.head_rows),
    "attend, causal": lambda c: qm.attend(
        _queries(c), c.heads, c.heads, causal=True, mask=c.mask
    ),
    "attend, wide": lambda c: qm.attend(
        c.array(2, 3, 300), c.array(2, c.num_tokens, 300), c.array(2, c.num_tokens, 4)
    ),
    "join_attention": _small(_join),
    "fold_bias": _small(lambda c: qm.fold_bias(_queries(c), c.heads, c.head_rows)),
    **{
        f"score_keys, {how}": _small(lambda c, how=how: _scores(c, how))
        for how in ("received", "snapkv", "expected", "rms", "last", "max")
    },
    "evict": _small(_evict),
    "match_attention": _small(
        lambda c: qm.match_attention(_queries(c), c.heads, c.heads, c.num_groups)
    ),
    "merge_kv_cache": _small(_merge),
    "LanguageModel.read": _small(_read),
    "KVStream": _kv_stream,
    "MergeStream": _merge_stream,
}
