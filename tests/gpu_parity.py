"""How the tests on a GPU call a public function and hold it against the reference.

``QM_CUPY_NO_POOL=1`` says that CuPy has no memory pool (see ``gpu_run``), so that
compute-sanitizer sees the bounds of each array. ``QM_CUPY_SIZES`` names the sizes N.
``QM_CUPY_REFERENCES`` names a folder in which processes share the references.
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
from gpu_calls import RESULTS, Kind, calls

marks = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a driver's warning is no fault of ours
]

NO_POOL = os.environ.get("QM_CUPY_NO_POOL") == "1"
SIZES = [int(n) for n in os.environ.get("QM_CUPY_SIZES", "33,257,1,128").split(",")]
ROUNDED = {"choose_merge"}  # which scores merged tokens, rounded to their dtype
HOST = {"MLPPrior.fit"}  # whose results are NumPy's wherever the tokens are
EXACT = {"dendrogram"}  # which names groups by numbers that 16 bits do not hold


def need_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


def as_numpy(x, dtype, wide=True):
    """Round to `dtype`; hold bfloat16 in float32, unless results depend on rounding."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    x = x.astype(dtype)
    return x.astype(np.float32) if wide and dtype.name == "bfloat16" else x


def as_given(x, library, dtype, strided=False):
    """Give an array to the GPU, floating ones in `dtype`; other arguments stay."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind == "f":
        x = x.astype(dtype)
    if strided:
        x = np.repeat(x, 2, axis=-1)
    if library == "cupy":
        given = cupy.asarray(x)
    elif library == "jax":
        import jax

        with jax.enable_x64(True):
            given = jax.numpy.asarray(x)
    else:
        import torch

        if x.dtype.name == "bfloat16":  # which torch does not take from NumPy
            given = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        else:
            given = torch.from_numpy(x).cuda()
    return given[..., ::2] if strided else given


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


def on_host(x):
    if type(x).__module__.startswith("torch"):
        x = x.cpu()
        half = x.dtype.is_floating_point and x.itemsize == 2
        return (x.float() if half else x).numpy()
    return x.get() if isinstance(x, cupy.ndarray) else np.asarray(x)


def result_kinds(name, dtype):
    """Return the dtype of each result and its column in the table of tolerances."""
    accumulation = "float64" if dtype == np.float64 else "float32"
    tokens, sums = (dtype.name, "stored"), (accumulation, "computed")
    gradients = tokens if dtype.itemsize == 2 else (dtype.name, "computed")
    of = {
        Kind.TOKENS: tokens,
        Kind.SUMS: sums,
        Kind.INTEGERS: ("int32", None),
        Kind.DENDROGRAM: ("float64", "heights"),
        Kind.GRADIENT: gradients,
        Kind.WEIGHTS: ("float32", "computed"),
    }
    return [of[kind] for kind in RESULTS.get(name, (Kind.SUMS,))]


def dtype_of(argument, dtype):
    """Return the dtype in which an argument is given."""
    return np.dtype(np.float64) if argument in EXACT else dtype


def run(call, library, dtype, strided=False):
    function, arguments = call
    given = {
        k: as_given(x, library, dtype_of(k, dtype), strided)
        for k, x in arguments.items()
    }
    return leaves(function(**given))


def reference_of(name, call, dtype):
    """Return the results of a call on NumPy arrays that are rounded to `dtype`."""
    function, arguments = call
    wide = name not in ROUNDED
    given = {k: as_numpy(x, dtype_of(k, dtype), wide) for k, x in arguments.items()}
    return leaves(function(**given))


@functools.cache
def reference(name, num_tokens, masked, ragged, dtype):
    """Return the reference of a call of the table, computed once for all processes."""
    call = calls(num_tokens, masked, ragged)[name]
    folder = os.environ.get("QM_CUPY_REFERENCES")
    if not folder:
        return reference_of(name, call, dtype)
    key = repr((name, num_tokens, masked, ragged, dtype.name)).encode()
    path = Path(folder, hashlib.sha256(key).hexdigest()[:24])
    if path.exists():
        return pickle.loads(path.read_bytes())
    wanted = reference_of(name, call, dtype)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(pickle.dumps(wanted))
    Path(file.name).replace(path)  # whole at once, for processes beside this one
    return wanted


def check(name, got, wanted, library, dtype):
    """Hold results against the reference: values, dtype, kind, place and layout."""
    assert len(got) == len(wanted)
    # Both sides round, and what comes at the end of a pipeline has rounded often.
    often = name.split(",")[0] in ("quickmerge", "choose_merge", *HOST)
    room = 20 if often else 2
    kinds = result_kinds(name, dtype)
    for x, y, (kind, column) in zip(got, wanted, kinds, strict=True):
        assert str(x.dtype).removeprefix("torch.") == kind
        assert tuple(x.shape) == np.shape(y)
        if name not in HOST:
            _check_kind(x, library)
        if column == "heights":  # rows of nearly equal ones may change places
            np.testing.assert_allclose(on_host(x)[..., 2], y[..., 2], 2e-5, 2e-6)
        elif kind == "int32":
            np.testing.assert_array_equal(on_host(x), y)
        else:
            # The weights of a fit are float32, whatever came in.
            held = max(TOLERANCE[dtype.name], TOLERANCE[kind])
            tolerance = room * getattr(held, column)
            found = on_host(x).astype(np.float64)
            np.testing.assert_allclose(found, y, rtol=tolerance, atol=tolerance)


def _check_kind(x, library):
    """Hold a result against the library it must come from, on the GPU, without gaps."""
    assert type(x).__module__.split(".")[0].removesuffix("lib") == library
    if library == "torch":
        assert x.is_cuda
        assert x.is_contiguous()
    elif library == "jax":
        assert x.device.platform == "gpu"
    else:
        assert x.flags.c_contiguous
