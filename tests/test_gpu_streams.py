"""Graphs, streams and memory on a GPU; needs CuPy and a GPU."""

import numpy as np
import pytest
from gpu_calls import NAMES, calls
from gpu_parity import (
    NO_POOL,
    SIZES,
    as_argument,
    cupy,
    leaves,
    marks,
    need_torch,
    on_host,
)

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES

pytestmark = marks

# Calls are captured into a CUDA graph. While a stream captures, the driver refuses
# every wait for it and every use of the legacy default stream, so the tests see both.
# The stream is not "non-blocking", because that would allow the legacy default stream.


def capture(function):
    """Return the empty result of a captured call, and a function that fills it."""
    stream = cupy.cuda.Stream()
    cupy.cuda.Device().synchronize()  # the inputs come from another stream
    with stream:
        for _ in range(2):  # compiles the kernels and fills the stream's memory pool
            function()
        stream.synchronize()
        stream.begin_capture()
        try:
            result = function()
        # Even after an error: a stream that still captures fails all later tests.
        finally:
            graph = stream.end_capture()

    def replay():
        graph.launch(stream)
        stream.synchronize()

    return result, replay


needs_pool = pytest.mark.skipif(NO_POOL, reason="a graph cannot allocate without pool")


COUNTS = {"num_groups", "budget", "hard"}  # K per sequence, known on the host
# These read values on the host that the GPU has computed: K, or weights.
WAIT = {"norm_budget", "choose_merge", "MLPPrior.fit"}


@needs_pool
@pytest.mark.parametrize("case", ["full", "padded", "ragged"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WAIT])
def test_no_host_synchronisation(name, case, gpu_kernels):
    function, arguments = calls(33, case != "full", case == "ragged")[name]
    inputs = {
        k: x if k in COUNTS else as_argument(x, "cupy", np.dtype("f4"))
        for k, x in arguments.items()
    }
    wanted = leaves(function(**inputs))
    got, replay = capture(lambda: leaves(function(**inputs)))
    for x in got:
        x[...] = 7  # the pool may return memory that still contains the last result
    cupy.cuda.Device().synchronize()
    replay()
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x.get(), y.get())


@needs_pool
def test_a_host_synchronisation_would_be_caught():
    # Without this check the tests above would pass on a driver that allows the
    # wait.
    x = cupy.arange(3)
    # "captur" is in CuPy's own message and in CUDA's.
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: int(x.sum()))


# A graph cannot allocate without a pool, so the linkages are left out then.
GRAPHED = [method for method in METHODS if not (NO_POOL and method in LINKAGES)]


def sequences(seed):
    """Return float32 tokens (2, 257, 64), or shorter ones if `SIZES` is shorter."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, max(SIZES), 64)).astype(np.float32)


def same_results(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert on_host(x).tobytes() == on_host(y).tobytes()


@pytest.mark.parametrize("method", GRAPHED)
def test_a_workspace_allocates_once(method, gpu_kernels):
    x, workspace = cupy.asarray(sequences(0)), qm.Workspace()
    wanted = qm.quickmerge(x, 9, method=method)
    # The first call sizes the workspace, the second one may still grow it.
    out = qm.quickmerge(x * 2, 9, method=method, workspace=workspace)
    assert workspace.nbytes > 0
    qm.quickmerge(x * 3, 9, method=method, out=out, workspace=workspace)
    num_bytes = workspace.nbytes

    def refuse(size):
        raise AssertionError(f"{size} bytes are allocated")

    # From here on any allocation is an error.
    with cupy.cuda.using_allocator(refuse):
        got = qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)
    assert got is out
    assert workspace.nbytes == num_bytes
    same_results(got, wanted)


# `out.tokens` are the first 2 * 9 * 64 elements of the buffer. The input starts at
# `offset`: the last offset is the first without an overlap.
@pytest.mark.parametrize("offset", [0, 64, 2 * 9 * 64 - 1, 2 * 9 * 64])
def test_out_must_not_overlap_an_input(offset):
    """Two views of one buffer: each becomes an array of its own on conversion."""
    buffer = cupy.zeros(40_000, cupy.float32)
    x = buffer[offset : offset + 2 * 33 * 64].reshape(2, 33, 64)
    x[...] = cupy.asarray(sequences(0)[:, :33])
    out = qm.quickmerge(x, 9)._replace(tokens=buffer[: 2 * 9 * 64].reshape(2, 9, 64))
    before = buffer.get()
    if offset < out.tokens.size:
        with pytest.raises(ValueError, match=r"`out\.tokens` must not share memory"):
            qm.quickmerge(x, 9, out=out)
        np.testing.assert_array_equal(buffer.get(), before)
    else:
        assert qm.quickmerge(x, 9, out=out) is out


@pytest.mark.parametrize("method", GRAPHED)
def test_a_graph_replays_with_new_inputs(method, gpu_kernels):
    x, workspace = cupy.asarray(sequences(0)), qm.Workspace()
    out = qm.quickmerge(x, 9, method=method, workspace=workspace)

    def call():
        return qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)

    _, replay = capture(call)
    for seed in (1, 2):
        x[...] = cupy.asarray(sequences(seed))  # the address that the graph reads
        cupy.cuda.Device().synchronize()
        replay()
        wanted = qm.quickmerge(cupy.asarray(sequences(seed)), 9, method=method)
        same_results(out, wanted)


@pytest.mark.parametrize("counts", [9, (9, 5)], ids=["alike", "ragged"])
@pytest.mark.parametrize("method", GRAPHED)
def test_a_graph_of_torch_replays_with_new_inputs(method, counts, gpu_kernels):
    torch = need_torch()
    x, workspace = torch.from_numpy(sequences(0)).cuda(), qm.Workspace()
    # A graph cannot contain a copy from the CPU: K per sequence must be arguments of
    # its kernels.
    budget = np.array(counts) if isinstance(counts, tuple) else counts
    out = qm.quickmerge(x, budget, method=method, workspace=workspace)
    # Grows the workspace before the capture.
    qm.quickmerge(x, budget, method=method, out=out, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qm.quickmerge(x, budget, method=method, out=out, workspace=workspace)
    for seed in (1, 2):
        new = torch.from_numpy(sequences(seed)).cuda()
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        same_results(out, qm.quickmerge(new, budget, method=method))


def sleep():
    """Keep CuPy's current stream busy for about a tenth of a second."""
    code = """extern "C" __global__ void wait(long long cycles) {
        for (long long start = clock64(); clock64() - start < cycles;) {}
    }"""
    # Cycles: 0.1 s at 2 GHz.
    cupy.RawKernel(code, "wait")((1,), (1,), (np.int64(200_000_000),))


def test_a_stream_waits_for_a_slow_producer():
    """The library's own stream waits, also through DLPack's `stream` argument."""

    class Producer:
        """Supports only DLPack, with its work on a side stream."""

        def __dlpack_device__(self):
            return x.__dlpack_device__()

        def __dlpack__(self, *, stream=None, **options):
            with side:  # CuPy lets `stream` wait for the current one
                return x.__dlpack__(stream=stream, **options)

    values = cupy.asarray(sequences(1))
    x = cupy.zeros_like(values)
    wanted = qm.norm_saliency(values).get()
    side, ours = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    for argument, stream in ((x, side), (Producer(), ours)):
        # Zeros remain if the call reads before the copy below.
        x[...] = 0
        cupy.cuda.Device().synchronize()
        with side:
            sleep()
            x[...] = values
            slow = side.record()
        with stream:
            got = qm.norm_saliency(argument)
            assert not slow.done  # the host has not waited; only the stream waits
            np.testing.assert_array_equal(got.get(), wanted)


def test_torch_tensors_use_the_current_stream_of_torch():
    """Another stream that waits for the current one does not read too early."""
    torch = need_torch()
    values = torch.from_numpy(sequences(1)).cuda()
    x = torch.zeros_like(values)
    wanted = qm.norm_saliency(values).cpu()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.copy_(values)
        slow = side.record_event()
        got = qm.norm_saliency(x)
        assert not slow.query()  # the host has not waited
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got.cpu(), wanted)
