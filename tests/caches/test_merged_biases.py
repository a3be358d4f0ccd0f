"""Biases of merged entries: log Σ e^b of the biases of their members."""

import numpy as np
import pytest

import qm_cupy as qm


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_entries_that_do_not_merge_keep_their_bits(rng, dtype):
    keys = rng.standard_normal((2, 20, 4)).astype(np.float32)
    bias = (100 * rng.standard_normal((2, 20))).astype(dtype)
    cache = qm.merge_kv_cache(keys, keys, 12, bias=bias, sinks=3, recent=4)
    # Sinks, recent entries, and others that did not merge.
    alone = cache.sizes == 1
    own = np.take_along_axis(bias, cache.positions, axis=-1)
    np.testing.assert_array_equal(cache.bias[alone], own[alone].astype(np.float32))
    assert alone.sum() >= 14


@pytest.mark.parametrize("spread", [1.0, 50.0])
def test_merged_biases_are_log_sum_exp(rng, spread):
    keys = rng.standard_normal((2, 2, 40, 4))
    bias = spread * rng.standard_normal((2, 2, 40))
    bias[:, 0, :3] = -np.inf  # padding, in no entry
    cache = qm.merge_kv_cache(keys, keys, 12, bias=bias, sinks=0, recent=2)
    for index in np.ndindex(2, 2):
        for k in range(12):
            # The members of an entry, by its label.
            members = bias[index][cache.labels[index] == k]
            top = members.max()
            wanted = top + np.log(np.exp(members - top).sum())
            np.testing.assert_allclose(cache.bias[index][k], wanted, atol=1e-12)


def test_biases_too_far_apart_stay_finite(rng):
    """A difference above 600 in a group is rounded to 600."""
    # Their exponentials overflow in every dtype.
    bias = 1e30 * rng.standard_normal(40).astype(np.float32)
    keys = rng.standard_normal((40, 4)).astype(np.float32)
    cache = qm.merge_kv_cache(keys, keys, 12, bias=bias, sinks=0, recent=2)
    assert np.isfinite(cache.bias).all()
