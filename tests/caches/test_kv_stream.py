"""`KVStream`: splits of the input, constant memory, and what merged entries hold."""

import numpy as np
import pytest
from conftest import to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import dtypes

import qm_cupy as qm
from qm_cupy.caches import kv_stream

FIELDS = "keys", "values", "bias", "sizes", "positions"
INV_FREQ = 100.0 ** -(np.arange(2) / 2)


def state(stream):
    return [to_numpy(getattr(stream, name)) for name in FIELDS]


def cache(rng, count, dtype=np.float64, leading=(2, 2)):
    """Return keys, values and queries; two heads of queries read each key head."""
    # Two heads of queries for each key head.
    heads = leading if len(leading) < 2 else (*leading[:-1], 2 * leading[-1])
    return [
        rng.standard_normal(shape).astype(dtype)
        for shape in ((*leading, count, 6), (*leading, count, 3), (*heads, count, 6))
    ]


def filled(arrays, splits=(), **options):
    """Return a stream that got keys, values and queries (or None) in parts."""
    options = {"budget": 10, "buffer": 5, "sinks": 2, "recent": 3, **options}
    stream = qm.KVStream(**options)
    # A split may be empty, or hold several merges.
    for start, stop in zip((0, *splits), (*splits, arrays[0].shape[-2]), strict=True):
        stream.append(*(x if x is None else x[..., start:stop, :] for x in arrays))
    return stream


def assert_same_bits(stream, other):
    for x, y in zip(state(stream), state(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@given(st.data())
def test_every_split_gives_the_same_bits(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    count = data.draw(st.integers(1, 60))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    leading = data.draw(st.sampled_from([(), (2,), (2, 2)]))
    keys, values, query = cache(rng, count, dtype, leading)
    # Queries are stored for the entries that have not merged.
    with_query = data.draw(st.booleans())
    options = data.draw(
        st.sampled_from(
            [
                {},
                {"inv_freq": INV_FREQ},
                {"inv_freq": INV_FREQ, "rotate_at": "first", "interleaved": True},
                {"sinks": 0, "recent": 0, "buffer": 1},
                {"calibrate": False, "buffer": 40},
                {"budget": 64, "recent": None},
            ]
        )
    )
    # Up to seven parts; then parts of one entry.
    splits = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    arrays = keys, values, query if with_query else None
    whole = filled(arrays, (), **options)
    assert_same_bits(filled(arrays, splits, **options), whole)
    assert_same_bits(filled(arrays, range(1, count), **options), whole)
    assert whole.num_seen == count
    # No entry is lost, and the last one ends the stream.
    np.testing.assert_array_equal(whole.sizes.sum(axis=-1), count)
    assert (whole.positions[..., -1] == count - 1).all()
    assert (np.diff(whole.positions, axis=-1) > 0).all()


def test_the_first_merge_is_that_of_merge_kv_cache(rng):
    keys, values, query = cache(rng, 15)
    # 15 entries are budget and buffer, so they merge once.
    stream = filled((keys, values, query), inv_freq=INV_FREQ)
    options = {"sinks": 2, "recent": 3, "inv_freq": INV_FREQ}
    # The queries of the last 3 + 5 entries, which have never merged.
    wanted = qm.merge_kv_cache(keys, values, 10, query=query[..., -8:, :], **options)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(stream, name), getattr(wanted, name))


def test_the_second_merge_continues_the_first(rng):
    keys, values, query = cache(rng, 20)
    # What the stream holds after its first merge, and five more entries.
    first = filled((keys[..., :15, :], values[..., :15, :], query[..., :15, :]))
    stream = filled((keys, values, query))
    keys, values = (
        np.concatenate((getattr(first, name), x[..., 15:, :]), axis=-2)
        for name, x in (("keys", keys), ("values", values))
    )
    bias, sizes, positions = (
        np.concatenate((getattr(first, name), np.broadcast_to(x, (2, 2, 5))), axis=-1)
        for name, x in (("bias", 0), ("sizes", 1), ("positions", np.arange(15, 20)))
    )
    wanted = qm.merge_kv_cache(
        keys, values, 10, query=query[..., -8:, :], bias=bias, positions=None,
        sinks=2, recent=3,
    )  # fmt: skip
    for name in ("keys", "values", "bias"):
        np.testing.assert_array_equal(getattr(stream, name), getattr(wanted, name))
    for index in np.ndindex(2, 2):
        # Sizes add up, and the last position counts.
        labels = wanted.labels[index]
        total = [sizes[index][labels == k].sum() for k in range(10)]
        last = [positions[index][labels == k].max() for k in range(10)]
        np.testing.assert_array_equal(stream.sizes[index], total)
        np.testing.assert_array_equal(stream.positions[index], last)


@pytest.mark.parametrize("count", [15, 40, 300])
def test_biases_add_up(rng, count):
    """Without calibration, the bias of an entry is the logarithm of its size."""
    keys, values, query = cache(rng, count)
    # Each merge adds the exponentials of the biases.
    stream = filled((keys, values, query), calibrate=False)
    np.testing.assert_allclose(stream.bias, np.log(stream.sizes), atol=1e-12)
    # There were several merges, or a large group.
    assert stream.sizes.max() > 2


def test_repeated_entries_merge_without_an_error(rng):
    """Attention to a stream of 4 different entries is exact."""
    keys, values, _ = cache(rng, 4, leading=(1, 2))
    order = rng.integers(0, 4, 500)
    # Equal entries merge first, at distance 0.
    keys, values = keys[..., order, :], values[..., order, :]
    stream = filled((keys, values, None), sinks=0, recent=0, budget=6)
    assert stream.keys.shape[-2] < 11
    # The stream holds all that attention needs.
    query = rng.standard_normal((1, 2, 3, 6))
    got, z = qm.attend(query, stream.keys, stream.values, bias=stream.bias)
    wanted, wanted_z = qm.attend(query, keys, values)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(z, wanted_z, rtol=1e-9)


@dtypes
def test_first_and_recent_entries_do_not_merge(rng, dtype):
    keys, values, query = cache(rng, 47, dtype)
    stream = qm.KVStream(12, buffer=3, sinks=2, recent=4)
    for t in range(47):
        step = np.s_[..., t : t + 1, :]
        stream.append(keys[step], values[step], query[step])
        # Sinks and recent entries, as far as they have come.
        first, last, seen = min(2, t + 1), min(4, t + 1), t + 1
        for got, x in ((stream.keys, keys), (stream.values, values)):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got[..., :first, :], x[..., :first, :])
            part = x[..., seen - last : seen, :]
            np.testing.assert_array_equal(got[..., -last:, :], part)
        # Their bias is 0, bit for bit.
        assert not stream.bias[..., -last:].any()
    assert stream.bias.dtype == (np.float64 if dtype == np.float64 else np.float32)


def test_memory_and_work_do_not_grow(rng, monkeypatch):
    # The shapes of keys and queries of all merges.
    calls = []
    merge = kv_stream.merge_kv_cache

    def counted(keys, values, budget, *, query, **options):
        calls.append((keys.shape, query.shape))
        return merge(keys, values, budget, query=query, **options)

    monkeypatch.setattr(kv_stream, "merge_kv_cache", counted)
    stream = qm.KVStream(9, buffer=7, sinks=1, recent=2)
    keys, values, query = cache(rng, 200, leading=(2,))
    for t in range(200):
        step = np.s_[:, t : t + 1]
        stream.append(keys[step], values[step], query[step])
        # A merge for each 7 entries after the first 9, always of 16 entries.
        assert len(calls) == max(0, (t + 1 - 9) // 7)
        assert stream.keys.shape[-2] <= 9 + 7 - 1
    assert set(calls) == {((2, 16, 6), (2, 9, 6))}
    # 16 entries: key, value, query, bias, size and position.
    stored = sum(x.nbytes for x in stream._stored.arrays.values())
    assert stored == 2 * 16 * (6 + 3 + 6 + 3) * 8
    stream.append(keys, values, query)
    assert len(calls) == (400 - 9) // 7


def test_results_are_in_the_library_of_the_input(rng, library):
    arrays = cache(rng, 32, np.float32)
    stream = filled([to_library(library, x) for x in arrays])
    assert type(stream.bias) is type(to_library(library, arrays[0]))
    assert_same_bits(stream, filled(arrays))


def test_a_refused_call_appends_nothing(rng):
    keys, values, query = cache(rng, 7)
    stream = filled((keys, values, query))
    wide = np.float32
    wrong = [
        ((keys[..., :5], values, query[..., :5]), ValueError, "`keys` must have shape"),
        ((keys[:, :1], values[:, :1], query), ValueError, "`keys` must have shape"),
        ((keys, values[..., :2], query), ValueError, "`values` must have shape"),
        ((keys, values[..., :6, :], query), ValueError, "`values` must have the axes"),
        ((keys, values, query[..., :6, :]), ValueError, "`query` must have shape"),
        ((keys, values, query[:, :2]), ValueError, "`query` must have shape"),
        ((keys, values, None), ValueError, "`query` must be passed in all calls"),
        ([x.astype(wide) for x in (keys, values, query)], TypeError, "must be float64"),
        ((keys * np.nan, values, query), ValueError, "`keys` must be finite"),
        ((keys, values * np.inf, query), ValueError, "`values` must be finite"),
        ((keys, values, query * np.nan), ValueError, "`query` must be finite"),
    ]
    # Each is refused before anything is stored.
    for arrays, error, message in wrong:
        with pytest.raises(error, match=message):
            stream.append(*arrays)
    # A part without entries is not an error.
    stream.append(keys[..., :0, :], values[..., :0, :], query[..., :0, :])
    assert stream.num_seen == 7
    assert_same_bits(stream, filled((keys, values, query)))


def test_an_empty_stream_has_no_keys():
    stream = qm.KVStream(np.int64(64))
    assert (stream.num_seen, repr(stream)) == (0, "KVStream(0 entries → 0)")
    with pytest.raises(ValueError, match="the stream has no entries yet"):
        _ = stream.keys


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "`budget` must be at least 1"),
        ({"budget": 0.5}, TypeError, "`budget` must be an integer"),
        ({"buffer": 0}, ValueError, "`buffer` must be at least 1"),
        ({"sinks": 60, "recent": 4}, ValueError, r"`sinks` \+ `recent` = 64"),
        ({"recent": -1}, ValueError, "`recent` must be ≥ 0"),
        ({"rotate_at": "first"}, ValueError, "needs `inv_freq`"),
        ({"rotate_at": "middle"}, ValueError, "`rotate_at` must be"),
        ({"interleaved": True}, ValueError, "need `inv_freq`"),
        ({"inv_freq": np.ones((2, 2))}, ValueError, "`inv_freq` must have shape"),
        ({"calibrate": 1}, TypeError, "`calibrate` must be True or False"),
        ({"window": 4}, ValueError, "`window` must be at least 8"),
        ({"scale": 0}, ValueError, "`scale` must lie in"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        qm.KVStream(**{"budget": 64, **options})


def test_too_many_frequencies_are_refused_at_the_first_call():
    # 10 elements would rotate, but the keys have 6.
    stream = qm.KVStream(64, inv_freq=np.ones(5))
    with pytest.raises(ValueError, match="r ≤ d = 6"):
        stream.append(np.ones((3, 6)), np.ones((3, 6)))
    assert stream.num_seen == 0
