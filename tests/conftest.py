"""What the tests share: one table of tolerances, random numbers, array libraries."""

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

# (rtol, atol) against float64 truth, by the dtype that came in.
TOLERANCE = {
    "float16": (2e-3, 2e-3),
    "float32": (2e-5, 2e-5),
    "float64": (1e-10, 1e-12),
}


def assert_close(got, wanted, dtype="float64"):
    rtol, atol = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)


@pytest.fixture(params=sorted(TOLERANCE))
def dtype(request):
    return np.dtype(request.param)


def to_library(name, x):
    """Give a NumPy array to another array library."""
    if name == "numpy":
        return x
    return pytest.importorskip(name).asarray(x.copy())


@pytest.fixture(params=["numpy", "torch", "array_api_strict"])
def library(request):
    """Name of an array library whose arrays the public functions take."""
    pytest.importorskip(request.param)
    return request.param
