"""`out=` and `workspace=`: the memory of results and of intermediate results.

A stand-in replaces CuPy's allocator, and kernels are interpreted on the CPU.
"""

import copy
import sys
import types
from contextlib import contextmanager

import numpy as np
import ptx
import pytest
from conftest import to_library, to_numpy
from seam import cuda

import qm_cupy as qm

FIELDS = qm.Merged._fields


class Pointer:
    """Like CuPy's MemoryPointer, it keeps its memory alive, which keeps its owner."""

    def __init__(self, memory, offset=0):
        self.memory, self.ptr = memory, getattr(memory, "ptr", 0) + offset


class Cupy:
    """A stand-in for CuPy that records the sizes of allocations."""

    def __init__(self):
        self.sizes, self.current, self.device = [], self.malloc, 0
        memory = types.SimpleNamespace
        self.cuda = types.SimpleNamespace(
            get_allocator=lambda: self.current,
            using_allocator=self.using,
            runtime=types.SimpleNamespace(
                getDevice=lambda: self.device, memGetInfo=lambda: (self.free, 0)
            ),
            MemoryPointer=Pointer,
            UnownedMemory=lambda ptr, size, owner, device: memory(
                ptr=ptr, owner=owner, device=device
            ),
        )
        self.free = 100

    def get_default_memory_pool(self):
        return types.SimpleNamespace(free_bytes=lambda: 0)

    def malloc(self, size):
        self.sizes.append(size)
        # A new address for each block.
        return Pointer(types.SimpleNamespace(ptr=1000 * len(self.sizes)))

    @contextmanager
    def using(self, allocator):
        before, self.current = self.current, allocator
        yield
        self.current = before


@pytest.fixture
def cupy(monkeypatch):
    stand_in = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    return stand_in


def test_blocks_of_one_size_are_lent_again(cupy):
    """A deleted array returns its block; the next one of this size gets it."""
    workspace = qm.Workspace()
    with workspace.lend():
        first, second = cupy.current(64), cupy.current(64)
        assert first.ptr != second.ptr
        del first
        third = cupy.current(64)  # the first block is free again
        assert cupy.sizes == [64, 64]
        fourth = cupy.current(65)  # no free block has exactly this size
        assert len({second.ptr, third.ptr, fourth.ptr}) == 3  # all in use
    assert cupy.current == cupy.malloc  # CuPy's own allocator again
    assert workspace.nbytes == 64 + 64 + 65
    del second, third, fourth
    for _ in range(3):  # the same requests, without new memory
        with workspace.lend():
            held = [cupy.current(size) for size in (65, 64, 64)]
            assert len({x.ptr for x in held}) == 3
            del held
    assert cupy.sizes == [64, 64, 65]


def test_a_block_of_another_device_is_not_lent(cupy):
    workspace = qm.Workspace()
    with workspace.lend():
        cupy.current(8)  # free at once, because nothing keeps the pointer
        cupy.device = 1
        assert cupy.current(8).memory.device == 1
    assert cupy.sizes == [8, 8]  # two allocations


def test_arrays_of_no_bytes_take_no_block(cupy):
    workspace = qm.Workspace()
    with workspace.lend():
        cupy.current(0)
    assert workspace.nbytes == 0


def test_free_memory_is_what_it_was_at_first(cupy):
    """The choice of an algorithm must not depend on what the workspace has taken."""
    workspace = qm.Workspace()
    with workspace.lend():
        assert cuda.free_memory() == 100
    cupy.free = 30
    with workspace.lend():
        assert cuda.free_memory() == 100
    assert cuda.free_memory() == 30  # without a workspace: the current amount


def test_a_workspace_cannot_be_copied():
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(qm.Workspace())


def problem(seed=0, dtype=np.float32):
    """Return tokens (2, 33, 8)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 33, 8)).astype(dtype)


def same(got, wanted):
    """Compare all fields bit by bit, with any array library."""
    for x, y in zip(got, wanted, strict=True):
        assert to_numpy(x).tobytes() == to_numpy(y).tobytes()


@pytest.mark.parametrize("method", ["average", "nearest", "contiguous"])
def test_out_is_written(library, method, dtype):
    if library == "jax":
        pytest.skip("JAX arrays are immutable: see below")
    if library == "array_api_strict" and np.dtype(dtype).itemsize == 2:
        pytest.skip("array-api-strict has no 16 bits")
    x, y = (to_library(library, problem(seed, dtype)) for seed in (0, 1))
    wanted = qm.quickmerge(y, 5, method=method)
    out = qm.quickmerge(x, 5, method=method)  # other tokens, so all values differ
    before = [to_numpy(part) for part in out]
    got = qm.quickmerge(y, 5, method=method, out=out, workspace=qm.Workspace())
    assert got is out
    same(before, wanted)  # `before` views the memory of `out`
    same(got, wanted)


def test_out_of_jax_cannot_be_written():
    x = to_library("jax", problem())
    with pytest.raises(TypeError, match=r"`out.tokens` cannot be written: JAX arrays"):
        qm.quickmerge(x, 5, out=qm.quickmerge(x, 5))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("wrong", ["shape", "dtype", "strided", "read-only", "list"])
def test_an_out_that_does_not_fit_is_not_changed(field, wrong):
    """All arrays are checked before the first one is written."""
    x = problem()
    out = qm.quickmerge(problem(1), 5)
    part = getattr(out, field)
    # np.frombuffer of bytes is read-only.
    part = {
        "shape": lambda: part[..., 1:].copy(),
        "dtype": lambda: part.astype(np.complex64),
        "strided": lambda: np.repeat(part, 2, axis=-1)[..., ::2],
        "read-only": lambda: np.frombuffer(part.tobytes(), part.dtype).reshape(
            part.shape
        ),
        "list": part.tolist,
    }[wrong]()
    out = out._replace(**{field: part})
    before = copy.deepcopy(out)
    with pytest.raises((TypeError, ValueError), match=rf"`out\.{field}` must"):
        qm.quickmerge(x, 5, out=out)
    for x, y in zip(out, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_out_must_be_a_merged_without_an_input():
    """An array that is input and output would be overwritten while it is read."""
    x = problem()
    with pytest.raises(TypeError, match="`out` must be a Merged, got ndarray"):
        qm.quickmerge(x, 5, out=x)
    scores = np.ones(x.shape[:2], np.float32)
    # The array that `out` would write is the array that the call reads.
    out = qm.quickmerge(x, 5)._replace(mass=scores)
    with pytest.raises(ValueError, match=r"`out.mass` must not share memory"):
        qm.quickmerge(x, 5, saliency=scores, out=out)


@pytest.mark.parametrize("weights", [None, "mass", "uniform", "float64"])
@pytest.mark.parametrize("source", ["tokens", "saliency", "hidden_states", "query"])
def test_out_has_the_dtypes_of_any_call(weights, source):
    """The result of one call fits as `out` of the next, for every source of weights."""
    x = problem()
    sources = {
        "tokens": {},
        "saliency": {"saliency": np.linspace(0, 1, 66).reshape(2, 33)},
        "hidden_states": {"hidden_states": problem(3, np.float64)},
        "query": {"query": problem(3, np.float64), "key": problem(4, np.float64)},
    }[source]
    if weights == "float64":  # an array of weights, which makes the mass float64
        weights = np.ones((2, 33))
    wanted = qm.quickmerge(x, 5, weights=weights, **sources)
    out = copy.deepcopy(wanted)
    for part in out:
        part[...] = 0  # a field that is not written would stay 0
    same(qm.quickmerge(x, 5, weights=weights, out=out, **sources), wanted)


@pytest.mark.parametrize("kernels", ["basic", "optimized"])
@pytest.mark.parametrize("method", ["average", "nearest", "bipartite", "contiguous"])
def test_results_are_not_in_the_memory_of_a_workspace(kernels, method, monkeypatch):
    """The next call would overwrite them. They are in fresh memory or in `out`."""
    ptx.install(monkeypatch)
    # The arrays allocated while a workspace lends memory, and the open workspaces.
    lent, open_now = [], []

    @contextmanager
    def lend(self):
        open_now.append(self)
        yield
        open_now.pop()

    def empty(shape, dtype):
        x = ptx.empty(shape, dtype)
        if open_now:
            lent.append(x)
        return x

    monkeypatch.setattr(qm.Workspace, "lend", lend)
    monkeypatch.setattr(cuda, "empty", empty)
    x, y = problem(), problem(1)
    with qm.use_kernels(kernels):
        plain = qm.quickmerge(x, 5, method=method)
        assert lent == []  # without a workspace
        workspace = qm.Workspace()
        out = qm.quickmerge(y, 5, method=method, workspace=workspace)
        assert lent  # the test would prove nothing without such arrays
        assert not any(np.shares_memory(a, b) for a in out for b in lent)
        again = qm.quickmerge(x, 5, method=method, out=out, workspace=workspace)
    assert again is out
    same(out, plain)
