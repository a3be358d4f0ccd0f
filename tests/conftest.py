"""Common parts of the tests: tolerances, random numbers, array libraries, fixtures."""

import os
from typing import NamedTuple

import numpy as np
import ptx
import pytest
from command_line import compress_fails, fails, tokens  # noqa: F401
from covering import pytest_addoption, pytest_collection_modifyitems  # noqa: F401
from gpu_at_hand import missing
from hypothesis import settings
from recorded import recording
from seam import cuda
from slow import pytest_runtest_setup, pytest_terminal_summary  # noqa: F401

import qm_cupy as qm
from qm_cupy.stages.clustering import linkage_cuda

# Its package `cupy` would replace CuPy; test_rehearsal.py uses it in other processes.
# docstrings.py is a script of `make lint`, whose packages `make test` does not install.
collect_ignore = ["rehearsal", "docstrings.py"]
NEED_A_GPU = [
    "plot/test_gpu_plot.py",
    "test_gpu_caches.py",
    "test_gpu_long.py",
    "test_gpu_parity.py",
    "test_gpu_streams.py",
    "test_gpu_torch.py",
]
if missing:
    collect_ignore += NEED_A_GPU


def pytest_report_header():
    """Name the files that do not run: skipping their tests would print thousands."""
    return f"left out: {', '.join(NEED_A_GPU)} ({missing})" if missing else None


# Hypothesis draws the same examples in every run, and sets no limit on their time.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


class Tolerance(NamedTuple):
    """Both rtol and atol, compared with float64 results, for values of about 1."""

    computed: float  # for results in the accumulation type
    stored: float  # for tokens, which are rounded once to the dtype of the input


# One table for the reference, the basic and the optimized kernels, by the dtype of the
# input. float16 keeps 11 bits and bfloat16 keeps 8, and the last bit is rounded: the
# relative error is 2 ** -11 or 2 ** -8. TF32 keeps 11 bits of each factor: 2 ** -9 of a
# product. In float32, tokens are means, but scores go through logarithms.
TOLERANCE = {
    "float16": Tolerance(computed=2e-5, stored=1e-3),
    "bfloat16": Tolerance(computed=2e-5, stored=8e-3),
    "float32": Tolerance(computed=2e-5, stored=2e-6),
    "float64": Tolerance(computed=1e-12, stored=1e-13),
    "tf32": Tolerance(computed=2e-3, stored=2e-6),  # float32 except for its products
}

# The largest change by allow_tf32, for values of about 1 and tokens of norm √D. For
# gradients it is relative to their largest entry. The docstring of allow_tf32 has the
# bounds.
TF32_TOLERANCE = {
    "cosine_similarity": 2e-3,
    "query_key_entropy": 1e-2,
    "self_attention_entropy": 1e-2,
    "attention_received": 1e-3,
    "alignment_loss": 2e-3,
    "MLPPrior.predict": 2e-3,
    "TransformerPrior.predict": 5e-3,
    "query_key_entropy_vjp": 5e-3,
    "self_attention_entropy_vjp": 5e-3,
    "attention_received_vjp": 5e-3,
    "alignment_loss_vjp": 5e-3,
}


def assert_close(got, wanted, dtype="float64", column="computed"):
    """Compare with the tolerance of a dtype; `column` is a field of `Tolerance`."""
    name = dtype if dtype == "tf32" else np.dtype(dtype).name
    tolerance = getattr(TOLERANCE[name], column)
    got = np.asarray(got).astype(np.float64)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)


@pytest.fixture(params=["float16", "float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


LIBRARIES = "numpy", "array_api_strict", "torch", "jax"


def to_library(name, x):
    """Copy a NumPy array to an array of another library, in the same dtype."""
    if name == "numpy":
        return x
    library, x = pytest.importorskip(name), x.copy()
    if name == "jax":
        with library.enable_x64(True):  # otherwise JAX narrows to 32 bits
            return library.numpy.asarray(x)
    if x.dtype.name == "bfloat16":  # torch.asarray does not accept NumPy's bfloat16
        return library.from_numpy(x.view(np.int16)).view(library.bfloat16)
    return library.asarray(x)


def to_numpy(x):
    """View an array of any of the libraries as a NumPy array."""
    if str(x.dtype) == "torch.bfloat16":
        bits = x.view(pytest.importorskip("torch").int16).numpy()
        return bits.view(pytest.importorskip("ml_dtypes").bfloat16)
    return np.asarray(x)


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Name of an array library whose arrays the public functions accept."""
    pytest.importorskip(request.param)
    return request.param


KERNELS = "basic", "optimized", "optimized-75"  # the last one: compiled for sm_75


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Name of the kernels that the interpreter runs under the public functions."""
    name, _, arch = request.param.partition("-")
    ptx.install(monkeypatch, arch=int(arch or 90))
    with qm.use_kernels(name):
        yield name


@pytest.fixture
def interpreted(monkeypatch):
    """Return a function that calls its first argument with interpreted kernels."""

    def call(function, *args, kernels="optimized", device=(5, 0), **options):
        with monkeypatch.context() as patch, qm.use_kernels(kernels):
            ptx.install(patch)
            # Blocks of two warps, so that small inputs need several blocks.
            patch.setattr(linkage_cuda, "LINKAGE_THREADS", {4: 64, 8: 64})
            patch.setattr(cuda, "current_device", lambda: cuda.Device(*device))
            return function(*args, **options)

    return call


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    names = []
    record = recording(lambda launch: names.append(launch.kernel))
    monkeypatch.setattr(cuda, "launch", record)
    return names


@pytest.fixture(params=["optimized", "basic"])
def gpu_kernels(request):
    """Name of the kernels that a GPU runs under the public functions."""
    with qm.use_kernels(request.param):
        yield request.param


@pytest.fixture(params=["cupy", "torch", "jax"])
def gpu_library(request):
    """Name of an array library that has arrays on the GPU."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
    if request.param == "jax":
        # Otherwise JAX reserves most of the GPU's memory at its first use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("this JAX has no CUDA")
    return request.param


_GPU_DTYPES = os.environ.get("QM_CUPY_DTYPES", "float16,bfloat16,float32,float64")


@pytest.fixture(params=_GPU_DTYPES.split(","))
def gpu_dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")  # it adds bfloat16 to NumPy
    return np.dtype(request.param)
