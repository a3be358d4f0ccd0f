"""Tests of the stand-in for CuPy, which tests/test_rehearsal.py runs."""

import re
from pathlib import Path

import cupy
import ml_dtypes
import names
import numpy as np
import pytest
from seam import cuda

import qm_cupy as qm

Error = cupy.cuda.runtime.CUDARuntimeError
CAPTURE = "cudaErrorStreamCaptureUnsupported"


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_every_name_is_one_of_cupys():
    path = Path(names.__file__).with_name("names.txt")
    wanted = {}
    for paragraph in re.split(r"\n(?=cupy)", path.read_text(encoding="utf-8")):
        owner, _, listed = paragraph.partition(": ")
        wanted[owner] = set(listed.split())
    mine = {*dir(type("Plain", (), {})), "__annotations__"}  # that Python itself adds
    for owner, offered in names.names(cupy).items():
        assert not offered - wanted[owner] - mine, owner


def test_it_is_no_numpy_array():
    x = cupy.asarray(numbers(3))
    assert not isinstance(x, np.ndarray)
    assert hasattr(type(x), "__cuda_array_interface__")
    assert not hasattr(x, "__array_namespace__")
    for hidden in ("__index__", "__imatmul__", "__dict__"):
        assert not hasattr(x, hidden)
    with pytest.raises(AttributeError, match="writeable"):
        _ = x.flags.writeable


@pytest.mark.parametrize(
    "use",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x == y,
        lambda x, y: x @ y,
        lambda x, y: np.maximum(x, y),
        lambda x, y: np.where(x > 0, x, y),
        lambda x, y: cupy.stack([x, y]),
        lambda x, y: cupy.RawKernel("", "wait")((1,), (1,), (y,)),
    ],
)
def test_numpy_operands_are_refused(use):
    with pytest.raises(TypeError, match="numpy"):
        use(cupy.asarray(numbers(3)), numbers(3))


def test_numpy_arrays_are_neither_assigned_nor_made():
    x = cupy.zeros((2, 3))
    with pytest.raises(ValueError, match="cannot be used for fill"):
        x[...] = np.ones((2, 3))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)


def test_what_it_has_not_it_names():
    x = cupy.ones(3)
    with pytest.raises(AttributeError, match=r"cupy\.hypot"):
        np.hypot(x, x)
    with pytest.raises(AttributeError, match=r"cupy\.median"):
        np.median(x)
    with pytest.raises(NotImplementedError, match="unknown"):
        cupy.RawKernel("", "unknown")


def test_where_has_no_bfloat16():
    x = cupy.asarray(numbers(5, dtype=ml_dtypes.bfloat16))
    assert (x + 1).dtype.name == "bfloat16"
    assert x.sum().dtype.name == "bfloat16"
    chosen = np.where(x > 0, x, 0)
    assert chosen.dtype == np.float32
    assert cupy.where(x > 0, x, x).dtype == np.float32


def test_elements_are_arrays_and_views():
    x = cupy.asarray(numbers(3, 4))
    assert isinstance(x[0, 0], cupy.ndarray)
    assert x[0, 0].shape == x.sum().shape == ()
    x[1][2] = 7
    assert x.get()[1, 2] == 7
    assert float(x[1, 2]) == 7


def test_indices_wrap_around():
    x = cupy.arange(5)
    assert x[cupy.asarray([4, 5, -1])].get().tolist() == [4, 0, 4]


def test_a_gap_shows():
    assert np.isnan(cupy.empty((2, 2), np.float16).get()).all()


def test_memory_shared_by_bounds_of_one_owner():
    """As CuPy compares it, which misses what DLPack has renamed."""
    x = cupy.zeros((6, 4))
    assert cupy.may_share_memory(x[1:], x[:2])
    assert not cupy.may_share_memory(x[2:], x[:2])
    assert cupy.may_share_memory(cupy.from_dlpack(x), x)
    assert not cupy.may_share_memory(cupy.from_dlpack(x[1:]), x)


def captured(function):
    stream = cupy.cuda.Stream()
    with stream:
        function()
        stream.begin_capture()
        try:
            result = function()
        finally:
            graph = stream.end_capture()
    return result, graph, stream


def test_a_graph_does_nothing_before_it_is_launched():
    x = cupy.asarray(numbers(4, 5))
    cupy.cuda.Device().synchronize()
    result, graph, stream = captured(lambda: qm.norm_saliency(x[None]) + 1)
    result[...] = -1
    x[...] = cupy.asarray(numbers(4, 5)[::-1])
    cupy.cuda.Device().synchronize()
    assert (result.get() == -1).all()
    graph.launch(stream)
    stream.synchronize()
    wanted = qm.norm_saliency(numbers(4, 5)[::-1][None]) + 1
    np.testing.assert_allclose(result.get(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.get(),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: bool(x[0]),
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1),
        lambda x: cupy.bincount(x.astype(int)),
        lambda x: cupy.cuda.get_current_stream().synchronize(),
        lambda x: cupy.cuda.Device().synchronize(),
        lambda x: cupy.empty(1 << 20),  # which no call before has left in the pool
    ],
)
def test_a_wait_spoils_a_capture(read):
    x, stream = cupy.ones(3), cupy.cuda.Stream()
    with stream:
        stream.begin_capture()
        with pytest.raises(Error, match=CAPTURE):
            read(x)
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            stream.end_capture()


def test_a_copy_from_the_cpu_spoils_a_capture():
    """It queries an event of the stream; a single number goes as an argument."""
    x, stream = cupy.ones(3), cupy.cuda.Stream()
    with stream:
        for _ in range(2):
            cupy.asarray(2.0), cupy.asarray([2.0])
        stream.begin_capture()
        cupy.asarray(2.0)
        stream.end_capture()
        stream.begin_capture()
        cupy.asarray([2.0])
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            x.fill(1)
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            stream.end_capture()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_default_stream_is_closed_to_blocking_captures(non_blocking):
    x, stream = cupy.ones(3), cupy.cuda.Stream(non_blocking=non_blocking)
    stream.begin_capture()
    if non_blocking:
        x.fill(1)
        stream.end_capture()
        return
    with pytest.raises(Error, match="cudaErrorStreamCaptureImplicit"):
        x.fill(1)
    with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
        stream.end_capture()


def sleep():
    cupy.RawKernel("", "wait")((1,), (1,), (np.int64(10**8),))


def test_a_stream_that_does_not_wait_reads_too_early():
    x = cupy.zeros(3)
    side, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with side:
        sleep()
        x.fill(1)
        filled = side.record()
    with other:
        early = x + 0
        assert not filled.done
        other.wait_event(filled)
        late = x + 0
        assert not filled.done
        assert late.get().tolist() == [1, 1, 1]
        assert early.get().tolist() == [0, 0, 0]
    assert filled.done


def test_blocking_streams_wait_for_the_default_one():
    x, side = cupy.zeros(3), cupy.cuda.Stream()
    sleep()
    x.fill(1)
    with side:
        assert (x + 0).get().tolist() == [1, 1, 1]


def test_an_array_that_dies_leaves_its_memory_to_the_next():
    pool = cupy.get_default_memory_pool()
    first = cupy.zeros(1000)
    address, total = first.data.ptr, pool.total_bytes()
    del first
    again = cupy.zeros(1000)
    assert again.data.ptr == address
    assert pool.total_bytes() == total


def test_memory_comes_from_the_current_allocator():
    def refuse(size):
        raise AssertionError(f"{size} bytes are allocated")

    x = cupy.ones(3)
    with (
        cupy.cuda.using_allocator(refuse),
        pytest.raises(AssertionError, match="24 bytes"),
    ):
        x + 1


def test_a_wrong_launch_fails():
    module = cupy.RawModule(
        code=cuda.source("basic/token_norms"), options=cuda.options("float32")
    )
    kernel = module.get_function("token_norms")
    with pytest.raises(RuntimeError, match="H100: takes 5 arguments, got 1"):
        kernel((1,), (1,), (cupy.ones(3, np.float32),))
    with pytest.raises(RuntimeError, match="named symbol not found"):
        module.get_function("unheard_of")


def test_a_card_sees_each_launch(monkeypatch):
    """An H100: a block has no more threads than the launch bound allows."""
    monkeypatch.setattr(cuda, "SELECTION_THREADS", 512)  # below a card's own limit
    source, options = cuda.source("optimized/select_tokens"), cuda.options("float32")
    kernel = cupy.RawModule(code=source, options=options).get_function("select_tokens")
    chosen, out = cupy.ones((1, 600), np.bool_), cupy.empty((1, 2), np.int32)
    args = chosen, np.int64(1), np.int64(600), np.int64(2), out
    kernel((1,), (cuda.SELECTION_THREADS,), args)
    assert out.get().tolist() == [[0, 1]]
    assert kernel.shared_size_bytes == 32 * 4
    with pytest.raises(RuntimeError, match="threads of a block: wanted 544, limit 512"):
        kernel((1,), (544,), args)
