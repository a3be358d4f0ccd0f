"""Tests of the stand-in for CuPy, which tests/test_rehearsal.py runs.

They state CuPy's and CUDA's rules that the stand-in keeps.
"""

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
    """Code that uses another name works here and fails with CuPy."""
    path = Path(names.__file__).with_name("names.txt")
    wanted = {}
    for paragraph in re.split(r"\n(?=cupy)", path.read_text(encoding="utf-8")):
        owner, _, listed = paragraph.partition(": ")
        wanted[owner] = set(listed.split())
    mine = {*dir(type("Plain", (), {})), "__annotations__"}  # names that Python adds
    for owner, offered in names.names(cupy).items():
        assert not offered - wanted[owner] - mine, owner


def test_an_array_is_not_a_numpy_array():
    x = cupy.asarray(numbers(3))
    assert not isinstance(x, np.ndarray)
    assert hasattr(type(x), "__cuda_array_interface__")
    assert not hasattr(x, "__array_namespace__")
    # NumPy's arrays have these attributes, but CuPy's do not.
    for hidden in ("__index__", "__imatmul__", "__dict__"):
        assert not hasattr(x, hidden)
    with pytest.raises(AttributeError, match="writeable"):
        _ = x.flags.writeable


# y is a NumPy array. On a GPU its memory could not be read.
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


def test_numpy_arrays_are_not_converted_implicitly():
    """Neither by an assignment to a CuPy array nor by np.asarray of one."""
    x = cupy.zeros((2, 3))
    with pytest.raises(ValueError, match="cannot be used for fill"):
        x[...] = np.ones((2, 3))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)


def test_errors_name_the_missing_function():
    """The stand-in has few of CuPy's functions; the others raise an error."""
    x = cupy.ones(3)
    with pytest.raises(AttributeError, match=r"cupy\.hypot"):
        np.hypot(x, x)
    with pytest.raises(AttributeError, match=r"cupy\.median"):
        np.median(x)
    with pytest.raises(NotImplementedError, match="unknown"):
        cupy.RawKernel("", "unknown")


def test_where_has_no_bfloat16():
    """Other functions keep bfloat16, but `where` returns float32."""
    x = cupy.asarray(numbers(5, dtype=ml_dtypes.bfloat16))
    assert (x + 1).dtype.name == "bfloat16"
    assert x.sum().dtype.name == "bfloat16"  # added up in float32
    result = np.where(x > 0, x, 0)
    assert result.dtype == np.float32
    assert cupy.where(x > 0, x, x).dtype == np.float32


def test_elements_are_arrays_and_views():
    """x[0, 0] is an array without axes, where NumPy returns a number."""
    x = cupy.asarray(numbers(3, 4))
    assert isinstance(x[0, 0], cupy.ndarray)
    assert x[0, 0].shape == x.sum().shape == ()
    x[1][2] = 7  # x[1] is a view
    assert x.get()[1, 2] == 7
    assert float(x[1, 2]) == 7


def test_indices_wrap_around():
    x = cupy.arange(5)
    # NumPy raises an error for index 5 of 5 elements; CuPy takes it modulo 5.
    assert x[cupy.asarray([4, 5, -1])].get().tolist() == [4, 0, 4]


def test_elements_that_are_not_written_are_nan():
    assert np.isnan(cupy.empty((2, 2), np.float16).get()).all()


def test_may_share_memory_compares_bounds_in_one_allocation():
    """CuPy's rule: arrays from DLPack whose memory starts elsewhere never overlap."""
    x = cupy.zeros((6, 4))
    assert cupy.may_share_memory(x[1:], x[:2])
    assert not cupy.may_share_memory(x[2:], x[:2])
    assert cupy.may_share_memory(cupy.from_dlpack(x), x)
    # These two overlap, but DLPack gives x[1:] a new start address.
    assert not cupy.may_share_memory(cupy.from_dlpack(x[1:]), x)


def captured(function):
    """Call a function twice in a stream; return the second result and its graph."""
    stream = cupy.cuda.Stream()
    with stream:
        # The first call fills the memory pool: a capture cannot allocate memory.
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
    # Change the result and the input: the graph reads the new input when it runs.
    result[...] = -1
    x[...] = cupy.asarray(numbers(4, 5)[::-1])
    cupy.cuda.Device().synchronize()
    assert (result.get() == -1).all()
    graph.launch(stream)
    stream.synchronize()
    wanted = qm.norm_saliency(numbers(4, 5)[::-1][None]) + 1
    np.testing.assert_allclose(result.get(), wanted, rtol=1e-6)


# Each call makes the CPU wait for the stream, or allocates memory.
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
        lambda x: cupy.empty(1 << 20),  # the pool has no free block of this size
    ],
)
def test_a_wait_spoils_a_capture(read):
    """A capture records work that has not run, so nothing can wait for its results."""
    x, stream = cupy.ones(3), cupy.cuda.Stream()
    with stream:
        stream.begin_capture()
        with pytest.raises(Error, match=CAPTURE):
            read(x)
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            stream.end_capture()


def test_a_copy_from_the_cpu_spoils_a_capture():
    """The copy queries an event of the stream. A single number needs no copy."""
    x, stream = cupy.ones(3), cupy.cuda.Stream()
    with stream:
        for _ in range(2):  # fill the pool
            cupy.asarray(2.0), cupy.asarray([2.0])
        stream.begin_capture()
        cupy.asarray(2.0)
        stream.end_capture()  # no error
        stream.begin_capture()
        cupy.asarray([2.0])  # the error appears at the next call
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            x.fill(1)
        with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
            stream.end_capture()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_default_stream_cannot_be_used_during_a_blocking_capture(non_blocking):
    """It would have to wait for the capturing stream, which does not run."""
    x, stream = cupy.ones(3), cupy.cuda.Stream(non_blocking=non_blocking)
    stream.begin_capture()
    if non_blocking:  # the two streams are independent
        x.fill(1)
        stream.end_capture()
        return
    with pytest.raises(Error, match="cudaErrorStreamCaptureImplicit"):
        x.fill(1)
    with pytest.raises(Error, match="cudaErrorStreamCaptureInvalidated"):
        stream.end_capture()


def sleep():
    """Keep the current stream busy for 10^8 cycles."""
    cupy.RawKernel("", "wait")((1,), (1,), (np.int64(10**8),))


def test_a_stream_that_does_not_wait_reads_too_early():
    x = cupy.zeros(3)
    side, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with side:
        sleep()
        x.fill(1)
        filled = side.record()
    with other:
        early = x + 0  # runs before x is filled
        assert not filled.done
        other.wait_event(filled)
        late = x + 0
        assert not filled.done  # the CPU has not waited
        assert late.get().tolist() == [1, 1, 1]
        assert early.get().tolist() == [0, 0, 0]
    assert filled.done


def test_blocking_streams_wait_for_the_default_one():
    x, side = cupy.zeros(3), cupy.cuda.Stream()
    sleep()
    x.fill(1)  # in the default stream, behind the sleep
    with side:
        assert (x + 0).get().tolist() == [1, 1, 1]


def test_freed_memory_is_used_by_the_next_array():
    pool = cupy.get_default_memory_pool()
    first = cupy.zeros(1000)
    address, total = first.data.ptr, pool.total_bytes()
    del first  # its block returns to the pool
    again = cupy.zeros(1000)
    assert again.data.ptr == address
    assert pool.total_bytes() == total


def test_memory_comes_from_the_current_allocator():
    # 3 elements of 8 bytes.
    def refuse(size):
        raise AssertionError(f"{size} bytes are allocated")

    x = cupy.ones(3)
    with (
        cupy.cuda.using_allocator(refuse),
        pytest.raises(AssertionError, match="24 bytes"),
    ):
        x + 1


def test_a_wrong_launch_fails():
    """The check of the card runs before the interpreter."""
    module = cupy.RawModule(
        code=cuda.source("basic/token_norms"), options=cuda.options("float32")
    )
    kernel = module.get_function("token_norms")
    with pytest.raises(RuntimeError, match="H100: takes 5 arguments, got 1"):
        kernel((1,), (1,), (cupy.ones(3, np.float32),))
    with pytest.raises(RuntimeError, match="named symbol not found"):
        module.get_function("unheard_of")


def test_the_card_checks_each_launch(monkeypatch):
    """An H100: a block has at most as many threads as the launch bound allows."""
    monkeypatch.setattr(cuda, "SELECTION_THREADS", 512)  # below a card's own limit
    source, options = cuda.source("optimized/select_tokens"), cuda.options("float32")
    kernel = cupy.RawModule(code=source, options=options).get_function("select_tokens")
    selected, out = cupy.ones((1, 600), np.bool_), cupy.empty((1, 2), np.int32)
    args = selected, np.int64(1), np.int64(600), np.int64(2), out
    kernel((1,), (cuda.SELECTION_THREADS,), args)
    assert out.get().tolist() == [[0, 1]]
    assert kernel.shared_size_bytes == 32 * 4  # 32 integers
    with pytest.raises(RuntimeError, match="threads of a block: wanted 544, limit 512"):
        kernel((1,), (544,), args)
