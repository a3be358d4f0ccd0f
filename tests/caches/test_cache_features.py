"""By what entries are grouped, and how heads with one budget are compared."""

import numpy as np
import pytest
from conftest import assert_close

from qm_cupy.caches.cache_checks import Rotary
from qm_cupy.caches.cache_features import grouping_features, head_weights

DIM, ENTRIES = 6, 40


@pytest.fixture
def arrays(rng):
    keys, values = rng.standard_normal((2, 2, ENTRIES, DIM))
    free = np.ones((2, ENTRIES), np.bool_)
    free[:, :4] = False
    return keys, 3 + 10 * values, free


def weights_of(query, rotary):
    """Return what the elements of keys of one head are multiplied by, squared."""
    keys, free = np.ones((ENTRIES, DIM)), np.ones(ENTRIES, np.bool_)
    values = np.zeros((ENTRIES, 1))
    return grouping_features(keys, values, query, free, rotary)[0, :DIM] ** 2


class TestVectors:
    def test_values_have_half_the_spread_of_keys(self, arrays):
        keys, values, free = arrays
        features = grouping_features(keys, values, None, free, None)
        np.testing.assert_array_equal(features[..., :DIM], keys)
        # Only entries that may merge count.
        spread = features[:, 4:].std(axis=1)
        of_keys = np.sqrt((spread[:, :DIM] ** 2).mean(-1))
        of_values = np.sqrt((spread[:, DIM:] ** 2).mean(-1))
        assert_close(of_values, 0.5 * of_keys)

    def test_entries_that_do_not_merge_may_be_huge(self, arrays):
        keys, values, free = arrays
        wanted = grouping_features(keys, values, None, free, None)
        for x in (keys, values):
            x[:, :4] = 1e60
        got = grouping_features(keys, values, None, free, None)
        assert_close(got[:, 4:], wanted[:, 4:])

    @pytest.mark.parametrize("constant", ["keys", "values"])
    def test_without_a_spread_values_do_not_count(self, arrays, constant):
        keys, values, free = arrays
        (keys if constant == "keys" else values)[:] = 2.0
        features = grouping_features(keys, values, None, free, None)
        assert not features[..., DIM:].any()

    def test_float32_does_not_overflow(self, arrays):
        keys, values, free = arrays
        scaled = [(x * 1e30).astype(np.float32) for x in (keys, values)]
        features = grouping_features(*scaled, None, free, None)
        wanted = grouping_features(keys, values, None, free, None)
        assert_close(features / np.float32(1e30), wanted, "float32")


class TestElements:
    """A tenth of a weight is 1, and the rest is the mean square of the queries."""

    query = np.sqrt(np.array([[[1.0, 2, 3, 4, 5, 9]]]))  # the mean is 4

    def test_without_a_rotation(self):
        got = weights_of(self.query, None)
        assert_close(got, 0.9 * np.array([1, 2, 3, 4, 5, 9]) / 4 + 0.1)

    @pytest.mark.parametrize(
        ("interleaved", "pairs"),
        [(False, [2, 3, 2, 3, 5, 9]), (True, [1.5, 1.5, 3.5, 3.5, 5, 9])],
    )
    def test_rotated_pairs_have_their_mean(self, interleaved, pairs):
        # The first four elements rotate.
        rotary = Rotary(np.ones(2), interleaved, 1.0)
        got = weights_of(self.query, rotary)
        assert_close(got, 0.9 * np.array(pairs) / 4 + 0.1)

    def test_rotated_queries_have_the_same_weights(self, rng):
        from qm_cupy.caches.rotary import rotate

        query = rng.standard_normal((1, 7, DIM))
        rotary = Rotary(np.array([1.0, 0.3, 0.1]), False, 1.0)
        turned = rotate(query, np.arange(7) * 5, rotary.inv_freq)
        assert_close(weights_of(turned, rotary), weights_of(query, rotary))

    def test_queries_of_zeros_say_nothing(self):
        np.testing.assert_array_equal(weights_of(np.zeros((1, 3, DIM)), None), 1)


class TestHeads:
    def test_attention_times_squared_queries(self, rng):
        free = np.ones((2, ENTRIES), np.bool_)
        free[:, 0] = False
        received = rng.random((2, ENTRIES))
        query = rng.standard_normal((4, 5, DIM))  # two heads read one key head
        query[2:] *= 3
        got = head_weights(received, query, free)
        squares = (query**2).reshape(2, -1).mean(-1)
        wanted = received[:, 1:].sum(-1) * squares
        assert_close(got[:, 0], wanted / wanted.max())

    def test_a_weight_is_positive(self, rng):
        received = np.zeros((2, ENTRIES))
        received[0] = 1
        free = np.ones((2, ENTRIES), np.bool_)
        got = head_weights(received, np.ones((2, 5, DIM)), free)
        assert_close(got[:, 0], [1, 1e-4])

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_float32_does_not_overflow(self, rng, size):
        received = rng.random((2, ENTRIES)).astype(np.float32)
        query = rng.standard_normal((2, 5, DIM)).astype(np.float32)
        free = np.ones((2, ENTRIES), np.bool_)
        got = head_weights(received, np.float32(size) * query, free)
        assert_close(got, head_weights(received, query, free), "float32")
