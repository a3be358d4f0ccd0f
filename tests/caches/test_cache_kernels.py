"""Every function of caches with interpreted kernels, compared with the reference.

A test runs with basic and with optimized kernels, in the PTX interpreter (tests/ptx).
"""

import cache_calls
import numpy as np
import ptx
import pytest
from conftest import KERNELS, TOLERANCE
from kernel_cases import DTYPES

import qm_cupy as qm


def converted(arguments, dtype):
    return {
        name: x.astype(dtype)
        if isinstance(x, np.ndarray) and x.dtype.kind == "f" and name != "inv_freq"
        else x
        for name, x in arguments.items()
    }


def compare(got, wanted, dtype):
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if x.dtype.kind in "iu":
            np.testing.assert_array_equal(x, y)
            continue
        name = np.dtype(dtype).name
        # The dtype of a result says whether it was rounded to that of the input.
        stored = x.dtype.itemsize == 2
        # A result that was merged has been rounded more than once.
        tolerance = 4 * TOLERANCE[name].stored if stored else 2e-4
        if name == "float64":
            tolerance = 1e-9
        np.testing.assert_allclose(
            x.astype(float), y.astype(float), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=[np.dtype(t).name for t in DTYPES])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", cache_calls.NAMES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_agree_with_the_reference(name, masked, dtype, kernels, monkeypatch):
    function, arguments = cache_calls.calls(40, masked)[name]
    arguments = converted(arguments, dtype)
    wanted = function(**arguments)
    # "optimized-75" means compiled for sm_75.
    folder, _, arch = kernels.partition("-")
    ptx.install(monkeypatch, arch=int(arch or 90))
    with qm.use_kernels(folder):
        got = function(**arguments)
    if not isinstance(wanted, tuple):
        got, wanted = (got,), (wanted,)
    compare(got, wanted, dtype)


def test_every_public_function_has_a_call():
    """Those of two folders, except the result types."""
    folders = "qm_cupy.caches.", "qm_cupy.language_models."
    public = {
        name
        for name in qm.__all__
        if getattr(getattr(qm, name), "__module__", "").startswith(folders)
    }
    assert public - {"KVCache", "ModelState"} == cache_calls.FUNCTIONS
