"""The device and stream of a call, with replacements for CuPy and CUDA tensors."""

import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import to_library
from seam import cuda
from test_libraries import CALLS

import qm_cupy as qm

NAMES = [name for name in CALLS if name != "decode"]


@pytest.fixture
def entered(monkeypatch):
    """Replace CuPy, on device 0; return the contexts that are entered now."""
    active = []

    @contextmanager
    def scope(context):
        active.append(context)
        try:
            yield
        finally:
            active.remove(context)

    def from_external(stream):
        return scope(("stream", *stream.__cuda_stream__()))

    cuda = types.SimpleNamespace(
        Device=lambda number: scope(("device", number)),
        Stream=types.SimpleNamespace(from_external=from_external),
        runtime=types.SimpleNamespace(getDevice=lambda: 0),  # the current device is 0
    )
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    return active


@cuda.on_callers_stream
def during(active, tokens, *, fail=False):
    # Runs inside the contexts that the decorator enters.
    if fail:
        raise RuntimeError("in the middle")
    return list(active)


def test_torch_works_in_its_current_stream(entered, monkeypatch):
    torch = pytest.importorskip("torch")

    class Tensor(torch.Tensor):
        device = types.SimpleNamespace(type="cuda", index=1)

    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    tensor = torch.zeros(2).as_subclass(Tensor)
    assert during(entered, tensor) == [("device", 1), ("stream", 0, 77)]
    merged = qm.Merged(tensor, *[None] * 4)
    assert during(entered, merged) == [("device", 1), ("stream", 0, 77)]
    # Contexts are left after an error too.
    with pytest.raises(RuntimeError, match="in the middle"):
        during(entered, tensor, fail=True)
    assert entered == []
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert during(entered, tensor) == []  # the conversion reports that CuPy is missing


# DLPack devices: (2, n) is CUDA device n, and 1 is the CPU.
# Device 0 is current already.
@pytest.mark.parametrize(
    ("dlpack_device", "wanted"),
    [((2, 1), [("device", 1)]), ((2, 0), []), ((1, 0), [])],
)
def test_other_arrays_use_their_device(entered, dlpack_device, wanted):
    class Producer:
        def __dlpack__(self):
            raise AssertionError("must not be read")

        def __dlpack_device__(self):
            return dlpack_device

    assert during(entered, Producer()) == wanted
    assert during(entered, tokens=Producer()) == wanted  # by keyword too


def test_numpy_and_cpu_tensors_need_no_context(entered, library):
    assert during(entered, to_library(library, np.ones(3))) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_public_function_asks_before_its_arrays_come_in(name, monkeypatch):
    function, arguments = CALLS[name]
    inside, entrances = [], []

    # A conversion outside of the caller's stream could read too early.
    @contextmanager
    def scope(_):
        inside.append(True)
        yield
        inside.pop()

    prepare = cuda._prepare

    def prepared(*args, **options):
        entrances.append(bool(inside))
        return prepare(*args, **options)

    monkeypatch.setattr(cuda, "scope_of", lambda arguments: scope(arguments))
    monkeypatch.setattr(cuda, "_prepare", prepared)
    function(**arguments)
    assert entrances  # the test would pass without any conversion
    assert all(entrances)
