"""The functions of caches leave arrays of a device there, and never mix them.

`device_values` replaces the device: kernels are interpreted, and arrays of the device
refuse those of the host, as those of CuPy do.
"""

import cache_calls
import device_values
import numpy as np
import pytest
from conftest import assert_close
from device_array import DeviceArray

# Reads of the host, for which it waits: numbers of entries, and heights of merges.
# These functions read nothing.
READ_NOTHING = (
    "attend", "join_attention", "fold_bias", "score_keys", "MergeStream",
)  # fmt: skip


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", cache_calls.NAMES)
def test_results_are_on_the_device(name, masked, monkeypatch):
    function, arguments = cache_calls.calls(40, masked)[name]
    # Before the device is replaced, so by the reference.
    wanted = as_tuple(function(**arguments))
    reads = device_values.install(monkeypatch)
    got = as_tuple(function(**arguments))
    assert {type(x) for x in got} == {DeviceArray}
    for x, y in zip(got, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.flags.c_contiguous
        host = x.view(np.ndarray)
        if y.dtype.kind in "iu":
            np.testing.assert_array_equal(host, y)
        else:
            # Padded entries have the bias -inf.
            finite = np.isfinite(y)
            np.testing.assert_array_equal(np.isfinite(host), finite)
            assert_close(host[finite], y[finite], "float32")
    if name.startswith(READ_NOTHING):
        assert reads == []
    else:  # `__bool__`, `x[mask]` and others would be reads by accident
        assert set(reads) <= {"to_host"}
