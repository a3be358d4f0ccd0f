"""`evict` compared with a plain loop over heads."""

from fractions import Fraction

import numpy as np
import pytest
from conftest import to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import dtypes

import qm_cupy as qm


def cache(rng, dtype=np.float64, leading=(2, 3), num_entries=12):
    """Return keys, values and scores."""
    shape = (*leading, num_entries)
    keys = rng.standard_normal((*shape, 4)).astype(dtype)
    values = rng.standard_normal((*shape, 3)).astype(dtype)
    return keys, values, rng.random(shape)


def best(scores, count, kept=()):
    """Return the indices of the `count` best of one head, with those of `kept`."""
    # Those of `kept` first, then by score; equal scores by position.
    order = sorted(range(len(scores)), key=lambda j: (j not in kept, -scores[j], j))
    return sorted(order[:count])


def check(got, index, keys, values, entries, bias=None):
    """Compare one head of the result with the entries that must remain."""
    count, total = len(entries), got.keys.shape[-2]
    np.testing.assert_array_equal(got.keys[index][:count], keys[index][entries])
    np.testing.assert_array_equal(got.values[index][:count], values[index][entries])
    # A kept entry has its own bias, and 0 if there is none.
    own = np.zeros(count) if bias is None else bias[index][entries]
    np.testing.assert_array_equal(got.bias[index][:count], own)
    np.testing.assert_array_equal(
        got.positions[index], [*entries, *(total - count) * [-1]]
    )
    np.testing.assert_array_equal(got.sizes[index], np.arange(total) < count)
    # An evicted entry is in no group.
    labels = [entries.index(j) if j in entries else -1 for j in range(keys.shape[-2])]
    np.testing.assert_array_equal(got.labels[index], labels)
    # Padding has no attention, and is 0.
    assert np.isneginf(got.bias[index][count:]).all()
    assert not got.keys[index][count:].any()
    assert not got.values[index][count:].any()


@dtypes
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
def test_keeps_the_largest_scores(rng, dtype, leading):
    keys, values, scores = cache(rng, dtype, leading)
    bias = rng.standard_normal(scores.shape).astype(np.float32)
    # A finite bias does not change what remains.
    got = qm.evict(keys, values, 5, scores=scores, bias=bias)
    assert got.keys.dtype == got.values.dtype == dtype
    assert got.bias.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert {x.dtype.name for x in got[3:]} == {"int32"}
    assert all(x.flags.c_contiguous for x in got)
    for index in np.ndindex(leading):
        check(got, index, keys, values, best(scores[index], 5), bias)


def test_evicts_by_hand():
    # The sign of zero is kept too.
    keys = np.array([[1.0], [-0.0], [3.0], [4.0]])
    got = qm.evict(keys, 10 * keys, 2, scores=np.array([0.2, 0.9, 0.2, 0.1]))
    np.testing.assert_array_equal(got.keys, [[1], [0]])  # the earlier of equal scores
    assert np.signbit(got.keys[1])  # a copy, bit for bit
    np.testing.assert_array_equal(got.values, [[10], [0]])
    np.testing.assert_array_equal(got.labels, [0, 1, -1, -1])
    np.testing.assert_array_equal(got.positions, [0, 1])
    np.testing.assert_array_equal(got.valid, [True, True])
    assert repr(got) == (
        "KVCache(4 entries → 2, leading axes (), width 1, float64, numpy)"
    )


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        (0.5, [[6, 6, 6], [6, 6, 6]]),
        (0.01, [[1, 1, 1], [1, 1, 1]]),
        (Fraction(1, 3), [[4, 4, 4], [4, 4, 4]]),
        (np.array([2, 7, 12]), [[2, 7, 12], [2, 7, 12]]),
        (np.array([[3], [5]]), [[3, 3, 3], [5, 5, 5]]),
        (np.int32(12), [[12, 12, 12], [12, 12, 12]]),
    ],
)
def test_budgets(rng, budget, counts):
    keys, values, scores = cache(rng)
    got = qm.evict(keys, values, budget, scores=scores)
    np.testing.assert_array_equal(got.sizes.sum(axis=-1), counts)
    # Heads with fewer entries are padded to the largest number.
    assert got.keys.shape[-2] == np.max(counts)
    for index in np.ndindex(2, 3):
        entries = best(scores[index], counts[index[0]][index[1]])
        check(got, index, keys, values, entries)


def test_a_ratio_is_of_the_entries_that_exist(rng):
    keys, values, scores = cache(rng)
    mask = np.ones((2, 12), bool)
    # 7 and 12 entries, of which half remain.
    mask[0, :5] = False
    got = qm.evict(keys, values, 0.5, scores=scores, mask=mask)
    np.testing.assert_array_equal(got.sizes.sum(axis=-1), [[3] * 3, [6] * 3])


@pytest.mark.parametrize("flags", [False, True])
def test_some_entries_must_remain(rng, flags):
    keys, values, scores = cache(rng)
    scores[..., [0, 1, 4, 10, 11]] = -1.0  # they would not remain by score
    protect = np.isin(np.arange(12), [4]) if flags else [4]
    options = {"scores": scores, "sinks": 2, "recent": 2, "protect": protect}
    got = qm.evict(keys, values, 7, **options)
    for index in np.ndindex(2, 3):
        # The sinks, the protected entry and the recent ones.
        kept = [0, 1, 4, 10, 11]
        check(got, index, keys, values, best(scores[index], 7, kept))
    # The budget may be spent by them alone.
    got = qm.evict(keys, values, 5, **options)
    np.testing.assert_array_equal(
        got.positions, np.broadcast_to([0, 1, 4, 10, 11], (2, 3, 5))
    )
    with pytest.raises(ValueError, match="`budget` must be at least"):
        qm.evict(keys, values, 4, **options)


def test_padding_is_not_read_and_never_remains(rng):
    keys, values, scores = cache(rng)
    mask = np.ones((2, 12), bool)
    mask[0, [0, 5, 11]] = False
    bias = np.zeros(scores.shape)
    # An entry without attention is padding too.
    bias[1, 1, 3] = -np.inf
    # What is masked may be anything.
    for x in (keys, values, scores, bias):
        x[0][:, [0, 5, 11]] = np.nan
    keys[1, 1, 3] = np.nan
    options = {"mask": mask, "bias": bias, "sinks": 1, "recent": 1}
    got = qm.evict(keys, values, 6, scores=scores, **options)
    assert all(np.isfinite(x).all() for x in (got.keys, got.values, got.bias))
    for b, h in np.ndindex(2, 3):
        gone = {0, 5, 11} if b == 0 else {3} if h == 1 else set()
        there = [j for j in range(12) if j not in gone]
        # Sinks and recent entries are counted without padding.
        inside = best(scores[b, h][there], 6, [0, len(there) - 1])
        check(got, (b, h), keys, values, [there[j] for j in inside], bias)


class TestPerHead:
    def test_heads_of_a_layer_compete(self, rng):
        keys, values, scores = cache(rng, leading=(2, 2, 3))
        scores[..., 0, :] += 2  # head 0 wins as many as it has
        got = qm.evict(keys, values, 8, scores=scores, per_head=True)
        # The sum over the heads is that of the budgets.
        counts = got.sizes.sum(axis=-1)
        np.testing.assert_array_equal(counts.sum(axis=-1), 24)
        assert (counts[..., 0] == 12).all()
        for pool in np.ndindex(2, 2):
            # All entries of a layer, the best first.
            every = sorted(
                (-scores[*pool, h, j], h, j) for h in range(3) for j in range(12)
            )[:24]
            for h in range(3):
                # Those of one head, in order.
                entries = sorted(j for _, head, j in every if head == h)
                check(got, (*pool, h), keys, values, entries)

    def test_every_head_keeps_an_entry(self, rng):
        keys, values, scores = cache(rng)
        # By score alone, head 2 would keep nothing.
        scores[:, 2] -= 5  # the worst of all
        got = qm.evict(keys, values, 2, scores=scores, per_head=True)
        np.testing.assert_array_equal(got.sizes.sum(axis=(1, 2)), [6, 6])
        for b in range(2):
            check(got, (b, 2), keys, values, best(scores[b, 2], 1))

    def test_without_heads_it_changes_nothing(self, rng):
        keys, values, scores = cache(rng, leading=(3,))
        one = qm.evict(keys, values, 4, scores=scores, per_head=True)
        for x, y in zip(one, qm.evict(keys, values, 4, scores=scores), strict=True):
            np.testing.assert_array_equal(x, y)


@given(st.data())
def test_attention_to_the_rest_is_that_of_the_entries(data):
    """Every label and position belongs to the entry that it names."""
    num = data.draw(st.integers(1, 20))
    scores = np.array(
        # Few values, so that many scores are equal.
        data.draw(
            st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=num, max_size=num)
        )
    )
    budget = data.draw(st.integers(1, num))
    # A key that is its own position.
    keys = np.arange(float(num))[:, None]
    got = qm.evict(keys, keys, budget, scores=scores)
    assert got.keys.shape == (budget, 1)
    np.testing.assert_array_equal(got.keys[:, 0], got.positions)
    np.testing.assert_array_equal(got.positions, best(scores, budget))
    np.testing.assert_array_equal(got.labels[got.positions], np.arange(budget))
    assert np.count_nonzero(got.labels >= 0) == budget


def test_results_are_in_the_library_of_the_input(rng, library):
    keys, values, scores = cache(rng, np.float32)
    arrays = [to_library(library, x) for x in (keys, values, scores)]
    got = qm.evict(*arrays[:2], 4, scores=arrays[2], sinks=1)
    wanted = qm.evict(keys, values, 4, scores=scores, sinks=1)
    for x, y in zip(got, wanted, strict=True):
        assert type(x) is type(arrays[0])
        np.testing.assert_array_equal(to_numpy(x), y)


def test_inputs_do_not_change_and_results_are_fresh(rng):
    keys, values, scores = cache(rng)
    before = [x.copy() for x in (keys, values, scores)]
    # Nothing is dropped: results could be the inputs themselves.
    got = qm.evict(keys, values, 12, scores=scores)
    for x, y in zip((keys, values, scores), before, strict=True):
        np.testing.assert_array_equal(x, y)
        assert not any(np.shares_memory(x, z) for z in got)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0}, ValueError, "`budget` must be at least 1 entry, or a fraction"),
        ({"budget": 13}, ValueError, "`budget` must lie in 1..12"),
        ({"budget": 1.5}, ValueError, r"`budget` must lie in \(0, 1\]"),
        ({"budget": True}, TypeError, "`budget` must be"),
        ({"budget": "12"}, TypeError, "`budget` must be an integer"),
        ({"budget": np.array([0.5, 0.5])}, TypeError, "`budget` must be integers"),
        ({"budget": np.array([3, 3])}, ValueError, "`budget` must broadcast"),
        ({"scores": np.ones(11)}, ValueError, "`scores` must have shape"),
        ({"scores": np.ones(12, int)}, TypeError, "`scores` must be float16"),
        ({"scores": np.full(12, np.nan)}, ValueError, "`scores` must be finite"),
        ({"values": np.ones((12, 3), np.float32)}, TypeError, "`values` must be"),
        ({"keys": np.full((12, 4), np.nan)}, ValueError, "`keys` must be finite"),
        ({"protect": [12]}, ValueError, "`protect` must have positions"),
        ({"protect": np.ones(11, bool)}, ValueError, "`protect` must have shape"),
        ({"sinks": -1}, ValueError, "`sinks` must be ≥ 0"),
        ({"recent": 1.5}, TypeError, "`recent` must be an integer"),
        ({"per_head": 1}, TypeError, "`per_head` must be True or False"),
        ({"mask": np.zeros(12, bool)}, ValueError, "at least one token"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    keys, values = np.ones((12, 4)), np.ones((12, 3))
    arguments = {"keys": keys, "values": values, "budget": 3, "scores": np.ones(12)}
    with pytest.raises(error, match=message) as caught:
        qm.evict(**{**arguments, **change})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
