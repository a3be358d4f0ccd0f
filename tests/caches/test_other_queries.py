"""`merge_kv_cache(causal=False)`: queries of another text, such as a second reading."""

import sys

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm
from qm_cupy.caches.cache_entries import default_recent, num_mergeable

# `qm.merge_kv_cache` is the function, so the module has to be looked up.
module = sys.modules["qm_cupy.caches.merge_kv_cache"]
ENTRIES, DIM = 60, 8
ALL = {"sinks": 0, "recent": 0}  # every entry may merge


def unit_values(rng, *leading):
    values = rng.standard_normal((*leading, ENTRIES, 5))
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


class TestDefaultRecent:
    @pytest.mark.parametrize(
        ("budget", "once", "again"),
        [(10, 5, 5), (40, 20, 8), (64, 32, 8), (90, 32, 11), (300, 100, 37)],
    )
    def test_counts(self, budget, once, again):
        for causal, wanted in ((True, once), (False, again)):
            assert default_recent(np.array(budget), (), causal) == wanted
            # Four sinks do not merge either.
            assert num_mergeable(budget, causal=causal) == budget - 4 - wanted

    def test_of_a_merge(self, rng):
        keys, values = rng.standard_normal((2, ENTRIES, DIM))
        query = rng.standard_normal((70, DIM))  # more queries than entries
        options = {"query": query, "causal": False}
        got = qm.merge_kv_cache(keys, values, 40, **options)
        for recent, same in ((8, True), (20, False)):
            other = qm.merge_kv_cache(keys, values, 40, recent=recent, **options)
            assert np.array_equal(got.labels, other.labels) == same

    def test_without_a_budget(self, rng):
        keys, values = rng.standard_normal((2, ENTRIES, DIM))
        options = {"max_error": 1.0, "sinks": 0}
        for causal, kept in ((True, 32), (False, 8)):
            cache = qm.merge_kv_cache(keys, values, causal=causal, **options)
            # Everything else becomes one entry.
            assert len(cache.keys) == kept + 1


def test_masses_are_not_flattened(rng):
    """The same groups as those of causal attention whose masses are m^(1 / 0.7)."""
    keys, values = rng.standard_normal((ENTRIES, DIM)), unit_values(rng)
    attention = 0.1 + rng.random(ENTRIES)
    mass = attention / attention.mean() + 0.02
    sharp = mass ** (1 / 0.7)
    sharp *= 1.02 / sharp.mean()
    got = qm.merge_kv_cache(keys, values, 20, attention=attention, causal=False, **ALL)
    same = qm.merge_kv_cache(keys, values, 20, attention=sharp - 0.02, **ALL)
    np.testing.assert_array_equal(got.labels, same.labels)
    other = qm.merge_kv_cache(keys, values, 20, attention=attention, **ALL)
    assert not np.array_equal(got.labels, other.labels)


class TestHeads:
    def test_those_that_a_query_looks_at_keep_more(self, rng):
        keys, values = rng.standard_normal((1, 1, ENTRIES, DIM)), unit_values(rng, 1, 1)
        keys, values = (np.repeat(x, 2, axis=1) for x in (keys, values))
        query = np.repeat(rng.standard_normal((1, 1, 9, DIM)), 2, axis=1)
        # The heads are equal, except how much any query looks at an entry.
        attention = rng.random((1, 2, ENTRIES))
        attention[:, 1] = attention[:, 0] / 100
        options = {"query": query, "attention": attention, "per_head": True, **ALL}
        counts = [
            qm.merge_kv_cache(keys, values, 20, causal=causal, **options).valid.sum(-1)
            for causal in (True, False)
        ]
        # A merge of one of two equal heads may be the last one of the budget.
        assert abs(counts[0][0, 0] - counts[0][0, 1]) <= 1
        assert counts[1][0, 0] > counts[1][0, 1] + 5
        assert [x.sum() for x in counts] == [40, 40]

    @pytest.mark.parametrize("heads", [2, 4])
    def test_both_attentions_count(self, rng, monkeypatch, heads):
        weighed = []

        def head_weights(received, *rest):
            weighed.append(received)
            return original(received, *rest)

        original = module.head_weights
        monkeypatch.setattr(module, "head_weights", head_weights)
        keys, values = rng.standard_normal((2, 1, 2, ENTRIES, DIM))
        query = rng.standard_normal((1, 4, 7, DIM))
        attention = rng.random((1, heads, ENTRIES))
        qm.merge_kv_cache(
            keys, values, 20, query=query, attention=attention, causal=False,
            per_head=True, **ALL,
        )  # fmt: skip
        scores = query.reshape(1, 2, 14, DIM) @ keys.swapaxes(-1, -2) * DIM**-0.5
        weights = np.exp(scores)
        received = (weights / weights.sum(-1, keepdims=True)).sum(-2)
        mean = attention.reshape(1, 2, -1, ENTRIES).mean(-2)
        assert_close(weighed[0], np.sqrt(received * mean))

    def test_large_attention_does_not_overflow(self, rng):
        keys, values = rng.standard_normal((2, 1, 2, ENTRIES, DIM)).astype(np.float32)
        query = rng.standard_normal((1, 2, 7, DIM)).astype(np.float32)
        attention = rng.random((1, 2, ENTRIES)).astype(np.float32)
        labels = [
            qm.merge_kv_cache(
                keys, values, 20, query=query, attention=np.float32(size) * attention,
                causal=False, per_head=True, **ALL,
            ).labels
            for size in (1, 2.0**120, 2.0**-120)
        ]  # fmt: skip
        np.testing.assert_array_equal(labels[0], labels[1])
        np.testing.assert_array_equal(labels[0], labels[2])
