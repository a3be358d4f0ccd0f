"""`KVCache` and the budgets of its heads."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from conftest import to_library, to_numpy

import qm_cupy as qm
from qm_cupy.caches.budgets import head_budgets


class TestKVCache:
    def test_repr_is_one_line_and_reads_no_values(self, rng, library):
        keys = rng.standard_normal((2, 3, 20, 4)).astype(np.float32)
        cache = qm.merge_kv_cache(*2 * [to_library(library, keys)], 12, recent=2)
        assert repr(cache) == (
            "KVCache(20 entries → 12, leading axes (2, 3), width 4, float32, "
            f"{library})"
        )

    def test_repr_of_other_objects_is_that_of_a_tuple(self):
        # JAX, for example, puts placeholders into the fields.
        fields = "k", "v", None, 1, 2, 3
        assert repr(qm.KVCache(*fields)) == f"KVCache{fields!r}"

    def test_valid_entries_have_members(self, rng, library):
        keys = to_library(library, rng.standard_normal((1, 2, 20, 4)))
        cache = qm.evict(keys, keys, np.array([5, 9]), scores=keys[..., 0])
        # Two heads of 5 and 9 entries, padded to 9.
        valid = to_numpy(cache.valid)
        np.testing.assert_array_equal(valid, to_numpy(cache.sizes) > 0)
        np.testing.assert_array_equal(valid.sum(axis=-1), [[5, 9]])
        # What is not valid gets no attention.
        assert np.isneginf(to_numpy(cache.bias)[~valid]).all()

    def test_fields_are_in_the_order_of_the_guide(self):
        # Users unpack the first three as arguments of `attend`.
        assert qm.KVCache._fields == (
            "keys", "values", "bias", "labels", "sizes", "positions",
        )  # fmt: skip


def entries(*counts):
    return np.array(counts, np.int64)


class TestHeadBudgets:
    @pytest.mark.parametrize(
        ("budget", "wanted"),
        [
            (3, [[3, 3], [3, 3]]),
            (np.int16(4), [[4, 4], [4, 4]]),
            (np.array([2, 4]), [[2, 4], [2, 4]]),  # of heads
            (np.array([[2], [4]]), [[2, 2], [4, 4]]),  # of sequences
            (np.array([[1, 2], [3, 4]], np.uint8), [[1, 2], [3, 4]]),
            (0.5, [[5, 4], [2, 5]]),  # floors of 5, 4.5, 2, 5
            (1.0, [[10, 9], [4, 10]]),
            (0.01, [[1, 1], [1, 1]]),  # at least one
            (np.float32(0.1), [[1, 1], [1, 1]]),
            (Fraction(1, 3), [[3, 3], [1, 3]]),
            (Decimal("0.7"), [[7, 6], [2, 7]]),
        ],
    )
    def test_numbers_of_entries(self, budget, wanted):
        counts = entries([10, 9], [4, 10])
        got = head_budgets(budget, (2, 2), counts)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, wanted)

    def test_a_ratio_means_the_fraction_that_was_written(self):
        # 0.29 * 100 is 28.999... in binary.
        assert head_budgets(0.29, (), entries(100)[0]) == 29

    def test_a_head_without_entries_keeps_none(self):
        np.testing.assert_array_equal(head_budgets(0.5, (2,), entries(0, 8)), [0, 4])

    @pytest.mark.parametrize(
        ("budget", "error", "message"),
        [
            (0, ValueError, "must be at least 1 entry, or a fraction"),
            (-1, ValueError, "must be at least 1 entry, or a fraction"),
            (5, ValueError, r"must lie in 1\.\.4 .*got 5: a cache that is short"),
            (np.array([[3, 3], [5, 3]]), ValueError, r"1\.\.4 .*got 5"),
            (np.array([1, 2, 3]), ValueError, r"broadcast to the axes \(2, 2\)"),
            (np.ones((1, 2, 2), int), ValueError, "must broadcast"),
            (0.0, ValueError, r"must lie in \(0, 1\]"),
            (1.01, ValueError, r"must lie in \(0, 1\]"),
            (8.0, ValueError, r"must lie in \(0, 1\].*pass 8"),
            (float("nan"), ValueError, r"must lie in \(0, 1\]"),
            (True, TypeError, "`budget` must be integers"),
            (np.array([0.5, 0.5]), TypeError, "`budget` must be integers"),
            ("half", TypeError, "`budget` must be an integer K"),
            (None, TypeError, "`budget` must be an integer K"),
            (1 + 0j, TypeError, "`budget` must be"),
        ],
    )
    def test_wrong_budgets_are_named(self, budget, error, message):
        with pytest.raises(error, match=message) as caught:
            head_budgets(budget, (2, 2), entries([9, 9], [4, 9]))
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)

    def test_with_per_head_only_the_mean_is_limited(self):
        counts = entries([9, 9], [4, 10])
        got = head_budgets(7, (2, 2), counts, (-1,))
        np.testing.assert_array_equal(got, 7)
        with pytest.raises(ValueError, match=r"1\.\.7"):
            head_budgets(8, (2, 2), counts, (-1,))
