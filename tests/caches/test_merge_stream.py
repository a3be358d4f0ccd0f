"""`MergeStream`: hand-worked merges, splits of the input, constant memory."""

import numpy as np
import pytest
from conftest import to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import dtypes

import qm_cupy as qm
from qm_cupy.caches import merge_stream

FIELDS = "tokens", "mass", "sizes", "positions"


def state(stream):
    return [to_numpy(getattr(stream, name)) for name in FIELDS]


def filled(tokens, splits=(), mass=None, **options):
    """Return a stream that got tokens (..., T, D) in parts."""
    stream = qm.MergeStream(**{"budget": 6, "buffer": 4, **options})
    # A split may be empty, or hold several merges.
    for start, stop in zip((0, *splits), (*splits, tokens.shape[-2]), strict=True):
        part = None if mass is None else mass[..., start:stop]
        stream.append(tokens[..., start:stop, :], part)
    return stream


def assert_same_bits(stream, other):
    for x, y in zip(state(stream), state(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_merges_by_hand():
    stream = qm.MergeStream(2, buffer=1, metric="euclidean")
    # Two tokens fit; the third one is the last of the buffer.
    for x in (0.0, 10.0):
        stream.append(np.array([[x]]))
    np.testing.assert_array_equal(stream.tokens, [[0], [10]])
    stream.append(np.array([[1.0]]))  # 0 and 1 merge
    for got, wanted in zip(
        state(stream), ([[10], [0.5]], [1, 2], [1, 2], [1, 2]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    # 11 merges with 10; then 14 with both, of which 10.5 counts twice.
    stream.append(np.array([[11.0], [14.0]]), np.array([1.0, 2.0]))
    for got, wanted in zip(
        state(stream), ([[0.5], [12.25]], [2, 4], [2, 3], [2, 4]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert repr(stream) == "MergeStream(5 tokens → 2 entries)"


@given(st.data())
def test_every_split_gives_the_same_bits(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    count = data.draw(st.integers(1, 50))
    batch = data.draw(st.sampled_from([(), (2,)]))
    # Merged tokens are rounded to this dtype at each merge.
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    tokens = rng.standard_normal((*batch, count, 3)).astype(dtype)
    mass = rng.random((*batch, count)) + 0.1
    options = data.draw(
        st.sampled_from(
            [{}, {"sinks": 2, "recent": 1}, {"buffer": 1}, {"metric": "euclidean"}]
        )
    )
    splits = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    whole = filled(tokens, (), mass, **options)
    assert_same_bits(filled(tokens, splits, mass, **options), whole)
    # The smallest parts.
    one_by_one = filled(tokens, range(1, count), mass, **options)
    assert_same_bits(one_by_one, whole)
    assert whole.num_seen == count
    # Nothing is lost: sizes count the tokens, and masses and means add up.
    np.testing.assert_array_equal(whole.sizes.sum(axis=-1), count)
    np.testing.assert_allclose(whole.mass.sum(-1), mass.sum(-1), rtol=1e-5)
    # The weighted sum of all tokens does not change.
    total = (whole.mass[..., None] * whole.tokens.astype(np.float64)).sum(axis=-2)
    tolerance = {"float16": 5e-2, "float32": 1e-4, "float64": 1e-11}
    wanted = (mass[..., None] * tokens.astype(np.float64)).sum(axis=-2)
    np.testing.assert_allclose(
        total, wanted, atol=tolerance[np.dtype(dtype).name], rtol=1e-2
    )
    # The last token of the stream is in the last entry, and entries are in order.
    assert (whole.positions[..., -1] == count - 1).all()
    assert (np.diff(whole.positions, axis=-1) > 0).all()


def test_a_merge_is_that_of_cluster_tokens_and_merge_tokens(rng):
    tokens, mass = rng.standard_normal((10, 5)), rng.random(10) + 0.1
    stream = filled(tokens, (), mass)
    # 10 tokens are budget and buffer, so they merge once.
    labels = qm.cluster_tokens(tokens, 6, method="ward", mass=mass)
    wanted = qm.merge_tokens(tokens, labels, 6, mass=mass)
    np.testing.assert_array_equal(stream.tokens, wanted)
    np.testing.assert_array_equal(stream.sizes, qm.group_sizes(labels, 6))
    np.testing.assert_array_equal(stream.positions, qm.group_positions(labels, 6))


@dtypes
def test_first_and_recent_tokens_do_not_merge(rng, dtype):
    tokens = rng.standard_normal((2, 47, 3)).astype(dtype)
    stream = qm.MergeStream(8, buffer=3, sinks=2, recent=3)
    for t in range(47):
        stream.append(tokens[:, t : t + 1])
        got, seen = stream.tokens, t + 1
        assert got.dtype == dtype
        # Sinks and recent tokens, as far as they have come.
        first, last = min(2, seen), min(3, seen)
        np.testing.assert_array_equal(got[:, :first], tokens[:, :first])
        np.testing.assert_array_equal(got[:, -last:], tokens[:, seen - last : seen])
        assert (stream.sizes[:, :first] == 1).all()
        assert (stream.sizes[:, -last:] == 1).all()


def test_memory_and_work_do_not_grow(rng, monkeypatch):
    # The shapes of all merges.
    calls = []
    cluster = merge_stream.compute_cluster_tokens

    def counted(tokens, *args, **options):
        calls.append(tokens.shape)
        return cluster(tokens, *args, **options)

    monkeypatch.setattr(merge_stream, "compute_cluster_tokens", counted)
    stream = qm.MergeStream(5, buffer=7)
    for t in range(300):
        stream.append(rng.standard_normal((1, 2)))
        # A merge for each 7 tokens after the first 5, always of 12 entries.
        assert len(calls) == max(0, (t + 1 - 5) // 7)
        assert len(stream.tokens) <= 5 + 7 - 1
    assert set(calls) == {(12, 2)}
    # 12 entries: 2 numbers of a token, its mass, size and position.
    arrays = stream._stored.arrays.values()
    assert sum(x.nbytes for x in arrays) == 12 * (2 + 1 + 1 + 1) * 8
    # One call with many tokens merges as often as many calls.
    stream.append(rng.standard_normal((70, 2)))
    assert len(calls) == (370 - 5) // 7


def test_results_are_in_the_library_of_the_input(rng, library):
    tokens = rng.standard_normal((2, 25, 3)).astype(np.float32)
    stream = filled(to_library(library, tokens))
    assert type(stream.tokens) is type(to_library(library, tokens))
    assert_same_bits(stream, filled(tokens))


def test_tokens_without_mass(rng):
    tokens = rng.standard_normal((40, 3))
    # Groups without mass have the plain mean.
    stream = filled(tokens, (), np.zeros(40))
    assert np.isfinite(stream.tokens).all()
    assert not stream.mass.any()


def test_results_are_copies(rng):
    stream = filled(rng.standard_normal((25, 3)))
    before = state(stream)
    for name in FIELDS:
        # This must not change the stream.
        getattr(stream, name)[...] = 0
    for x, y in zip(state(stream), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_refused_call_appends_nothing(rng):
    tokens = rng.standard_normal((7, 3))
    stream = filled(tokens)
    wrong = [
        (tokens[:, :2], None, ValueError, "`tokens` must have shape"),
        (tokens[None], None, ValueError, "`tokens` must have shape"),
        (tokens.astype(np.float32), None, TypeError, "must be float64 as in earlier"),
        (tokens * np.nan, None, ValueError, "`tokens` must be finite"),
        (tokens, np.ones(6), ValueError, "`mass` must have shape"),
        (tokens, -np.ones(7), ValueError, "`mass` must be"),
        (tokens, np.full(7, np.inf), ValueError, "`mass` must be finite"),
        (tokens, np.ones(7, int), TypeError, "`mass` must be float16"),
        (tokens.astype(int), None, TypeError, "`tokens` must be float16"),
        ([[1.0]], None, TypeError, "`tokens` must be an array"),
    ]
    # Each is refused before anything is stored.
    for x, mass, error, message in wrong:
        with pytest.raises(error, match=message):
            stream.append(x, mass)
    # A part without tokens is not an error.
    stream.append(tokens[:0])
    assert stream.num_seen == 7
    assert_same_bits(stream, filled(tokens))


def test_an_empty_stream_has_no_tokens():
    stream = qm.MergeStream(3)
    assert (stream.num_seen, repr(stream)) == (0, "MergeStream(0 tokens → 0 entries)")
    with pytest.raises(ValueError, match="the stream has no tokens yet"):
        _ = stream.tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "`budget` must be at least 1"),
        ({"budget": 0.5}, TypeError, "`budget` must be an integer"),
        ({"buffer": 0}, ValueError, "`buffer` must be at least 1"),
        ({"sinks": -1}, ValueError, "`sinks` must be ≥ 0"),
        ({"sinks": 3, "recent": 3}, ValueError, r"`sinks` \+ `recent` = 6"),
        ({"metric": "dot"}, ValueError, "`metric` must be"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        qm.MergeStream(**{"budget": 6, **options})
