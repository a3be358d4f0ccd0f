"""Compares the functions of key-value caches on a GPU with the reference."""

import cache_calls
import numpy as np
import pytest
from conftest import TOLERANCE
from gpu_at_hand import cupy
from gpu_parity import leaves, marks, on_host

import qm_cupy as qm

pytestmark = marks


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", cache_calls.NAMES)
def test_results_are_those_of_the_reference(name, masked, dtype, gpu_kernels):
    function, arguments = cache_calls.calls(40, masked)[name]
    arguments = {
        key: x.astype(dtype) if getattr(x, "dtype", None) == np.float64 else x
        for key, x in arguments.items()
    }
    on_gpu = {
        key: cupy.asarray(x) if isinstance(x, np.ndarray) and key != "inv_freq" else x
        for key, x in arguments.items()
    }
    for x, y in zip(
        leaves(function(**on_gpu)), leaves(function(**arguments)), strict=True
    ):
        got = on_host(x)
        assert got.dtype == y.dtype
        if y.dtype.kind in "iu":
            np.testing.assert_array_equal(got, y)
            continue
        half = y.dtype.itemsize == 2
        tolerance = 4 * TOLERANCE["float16"].stored if half else 2e-4
        np.testing.assert_allclose(
            got.astype(float), y.astype(float), rtol=tolerance, atol=tolerance
        )


def test_a_long_cache_is_merged_in_windows(gpu_kernels):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 2, 3000, 64)).astype(np.float32)
    query = rng.standard_normal((2, 4, 32, 64)).astype(np.float32)
    inv_freq = 1e4 ** -(np.arange(32) / 32)
    arrays = keys, keys, 0.25
    wanted = qm.merge_kv_cache(*arrays, query=query, inv_freq=inv_freq)
    on_gpu = cupy.asarray(keys)
    got = qm.merge_kv_cache(
        on_gpu, on_gpu, 0.25, query=cupy.asarray(query), inv_freq=inv_freq
    )
    # Rounding decides a few merges, and the numbers of all later groups change. So
    # compare the last entry of the group of each entry.
    last = [
        np.take_along_axis(on_host(x.positions), on_host(x.labels), -1)
        for x in (got, wanted)
    ]
    assert (last[0] == last[1]).mean() > 0.8
    np.testing.assert_array_equal(on_host(got.sizes).sum(-1), wanted.sizes.sum(-1))
