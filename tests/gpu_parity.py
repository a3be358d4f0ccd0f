"""How the tests on a GPU call a public function and compare it with the reference.

``QM_CUPY_NO_POOL=1`` says that CuPy has no memory pool (see ``gpu_run``), so that
compute-sanitizer sees the bounds of each array. ``QM_CUPY_SIZES`` names the sizes N.
``QM_CUPY_REFERENCES`` names a folder with the references of all processes.
"""

import functools
import hashlib
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCE
from gpu_at_hand import cupy
from gpu_calls import RESULTS, Variant, calls

marks = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a warning of the driver is not our fault
]

NO_POOL = os.environ.get("QM_CUPY_NO_POOL") == "1"
SIZES = [int(n) for n in os.environ.get("QM_CUPY_SIZES", "33,257,1,128").split(",")]
ROUNDED = {"choose_merge"}  # it scores merged tokens that are rounded to their dtype
HOST = {"MLPPrior.fit"}  # its results are NumPy arrays, wherever the tokens are
EXACT = {"dendrogram"}  # it numbers groups beyond the integers that 16 bits represent


def need_torch():
    """Return torch, or skip the test without a torch that has CUDA."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


def as_numpy(x, dtype, wide=True):
    """Round to `dtype`, then widen bfloat16 unless results depend on the rounding.

    The reference of bfloat16 tokens is that of float32 before its last rounding.
    """
    if type(x) is tuple:  # layers
        return tuple(as_numpy(y, dtype, wide) for y in x)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    x = x.astype(dtype)
    return x.astype(np.float32) if wide and dtype.name == "bfloat16" else x


def as_argument(x, library, dtype, strided=False):
    """Move an array to the GPU, a floating one in `dtype`; return others unchanged."""
    if type(x) is tuple:  # layers
        return tuple(as_argument(y, library, dtype, strided) for y in x)
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind == "f":
        x = x.astype(dtype)
    if strided:  # every second element of a longer row
        x = np.repeat(x, 2, axis=-1)
    if library == "cupy":
        argument = cupy.asarray(x)
    elif library == "jax":
        import jax

        # Without x64 JAX would narrow float64 and int64 arrays.
        with jax.enable_x64(True):
            argument = jax.numpy.asarray(x)
    else:
        import torch

        if x.dtype.name == "bfloat16":  # torch does not read it from NumPy
            argument = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        else:
            argument = torch.from_numpy(x).cuda()
    return argument[..., ::2] if strided else argument


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


def on_host(x):
    if type(x).__module__.startswith("torch"):
        x = x.cpu()
        # NumPy has no bfloat16 of its own; float32 represents every 16-bit value.
        half = x.dtype.is_floating_point and x.itemsize == 2
        return (x.float() if half else x).numpy()
    return x.get() if isinstance(x, cupy.ndarray) else np.asarray(x)


def array_types(name, dtype):
    """Return (dtype, column of the table of tolerances) of each result."""
    accumulation = "float64" if dtype == np.float64 else "float32"
    tokens, sums = (dtype.name, "stored"), (accumulation, "computed")
    # A 16-bit gradient is rounded once when it is stored; a wider one is not.
    gradients = tokens if dtype.itemsize == 2 else (dtype.name, "computed")
    types = {
        Variant.TOKENS: tokens,
        Variant.SUMS: sums,
        Variant.INTEGERS: ("int32", None),
        Variant.DENDROGRAM: ("float64", "heights"),
        Variant.GRADIENT: gradients,
        Variant.WEIGHTS: ("float32", "computed"),
    }
    return [types[variant] for variant in RESULTS.get(name, (Variant.SUMS,))]


def dtype_of(argument, dtype):
    """Return the dtype for an argument: `dtype`, or float64 if it must be exact."""
    return np.dtype(np.float64) if argument in EXACT else dtype


def run(call, library, dtype, strided=False):
    function, arguments = call
    inputs = {
        k: as_argument(x, library, dtype_of(k, dtype), strided)
        for k, x in arguments.items()
    }
    return leaves(function(**inputs))


def reference_of(name, call, dtype):
    """Return the results of a call on NumPy arrays that are rounded to `dtype`."""
    function, arguments = call
    wide = name not in ROUNDED
    inputs = {k: as_numpy(x, dtype_of(k, dtype), wide) for k, x in arguments.items()}
    return leaves(function(**inputs))


@functools.cache
def reference(name, num_tokens, masked, ragged, dtype):
    """Return the reference results of a call, computed once for all processes."""
    call = calls(num_tokens, masked, ragged)[name]
    folder = os.environ.get("QM_CUPY_REFERENCES")
    if not folder:
        return reference_of(name, call, dtype)
    key = repr((name, num_tokens, masked, ragged, dtype.name)).encode()
    # A name for any file system.
    path = Path(folder, hashlib.sha256(key).hexdigest()[:24])
    if path.exists():
        return pickle.loads(path.read_bytes())
    wanted = reference_of(name, call, dtype)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(pickle.dumps(wanted))
    Path(file.name).replace(path)  # atomic: other processes never read a partial file
    return wanted


def check(name, got, wanted, library, dtype):
    """Compare results with the reference: values, dtype, type, device and layout."""
    assert len(got) == len(wanted)
    # Both sides round; the results of a pipeline have been rounded several times.
    often = name.split(",")[0] in ("quickmerge", "choose_merge", *HOST)
    room = 20 if often else 2
    types = array_types(name, dtype)
    for x, y, (type_name, column) in zip(got, wanted, types, strict=True):
        assert str(x.dtype).removeprefix("torch.") == type_name
        assert tuple(x.shape) == np.shape(y)
        if name not in HOST:
            _check_array(x, library)
        if column == "heights":  # merges of nearly equal heights may change their order
            np.testing.assert_allclose(on_host(x)[..., 2], y[..., 2], 2e-5, 2e-6)
        elif type_name == "int32":
            np.testing.assert_array_equal(on_host(x), y)
        else:
            # The weights of a fit are float32, whatever the dtype of the tokens.
            tolerances = max(TOLERANCE[dtype.name], TOLERANCE[type_name])
            tolerance = room * getattr(tolerances, column)
            actual = on_host(x).astype(np.float64)
            np.testing.assert_allclose(actual, y, rtol=tolerance, atol=tolerance)


def _check_array(x, library):
    """Check that a result is a contiguous array of the library, on the GPU."""
    # "jaxlib" is JAX.
    assert type(x).__module__.split(".")[0].removesuffix("lib") == library
    if library == "torch":
        assert x.is_cuda
        assert x.is_contiguous()
    elif library == "jax":
        assert x.device.platform == "gpu"
    else:
        assert x.flags.c_contiguous
