"""The models of cards: each limit is reached, and exceeded by one."""

import numpy as np
import nvrtc
import pytest
from card_device import facts_of, files, parameters_of
from cards import CARDS, Kernel, LaunchError, blocks_per_sm
from device_array import READS, DeviceArray, MixedArraysError, empty, to_device
from seam import cuda

PLANTED = """
extern "C" __global__ void plain(const int* x, double a, long long n, bool* out) {
    if (threadIdx.x < n) out[threadIdx.x] = x[threadIdx.x] < a;
}

extern "C" __global__ void __launch_bounds__(512, 1) bounded(int* out) { *out = 1; }

extern "C" __global__ void shared(int* out) {
    __shared__ int x[100];
    x[threadIdx.x % 100] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = x[(threadIdx.x + 1) % 100];
}

extern "C" __global__ void waiting(long long blocks, int* out) { *out = blocks; }

// Holds 200 values at once.
extern "C" __global__ void __launch_bounds__(256, 1) wide(float* out) {
    float x[200];
    #pragma unroll
    for (int i = 0; i < 200; ++i) x[i] = out[i * 256 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 200; ++i) out[(i + 1) * 256 + threadIdx.x] = x[i] * x[199 - i];
}
"""
# Bytes of shared memory that a block can ask for; see cards.py.
OPT_IN = {"T4": 65_536, "A100": 166_912, "RTX 4090": 101_376, "H100": 232_448}
# An SM has 1024 or 1536 threads (one block) or 2048 (two): 40, 108 * 2, 128, 132 *
# 2.
RESIDENT = {"T4": 40, "A100": 216, "RTX 4090": 128, "H100": 264}  # blocks of 1024
NUMBERS = np.zeros(8, np.int32).view(DeviceArray)


def planted(name, card, cooperative=False, options=(), **changed):
    """Return a kernel of `PLANTED` on a card, with some facts changed."""
    options = ("--std=c++17", f"-arch=sm_{card.arch}", *options)
    facts = nvrtc.kernel_facts(PLANTED, options)[name]._replace(**changed)
    parameters = parameters_of(PLANTED, name, "float32")
    return Kernel(name, facts, parameters, card, cooperative)


@pytest.fixture(params=CARDS, ids=lambda card: card.name)
def card(request):
    return request.param


def refused(resource, wanted, limit):
    """Expect the error of a limit."""
    return pytest.raises(
        LaunchError, match=f"{resource}: wanted {wanted}, limit {limit}$"
    )


def test_facts_are_those_of_the_machine_code(card):
    options = ("--std=c++17", f"-arch=sm_{card.arch}")
    facts = nvrtc.kernel_facts(PLANTED, options)
    # Everything but the double is a 64-bit integer or pointer.
    assert facts["plain"].parameters == ["u64", "f64", "u64", "u64"]
    assert facts["shared"].shared == 400  # 100 integers
    assert facts["bounded"].bound == 512
    assert facts["plain"].bound is None
    # 200 values and their addresses fit in the 255 registers of a thread.
    assert 200 < facts["wide"].registers < 256
    assert facts["wide"].spilled == 0
    # With 64 registers the values must go to memory: the facts must show it.
    unbound = PLANTED.replace("__launch_bounds__(256, 1) wide", "wide")
    narrow = nvrtc.kernel_facts(unbound, (*options, "-maxrregcount=64"))["wide"]
    assert narrow.bound is None
    assert narrow.registers == 64
    assert narrow.spilled > 0


def test_facts_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    options = ("-arch=sm_80",)
    source = 'extern "C" __global__ void kept(int* out) { *out = 7; }'
    facts = nvrtc.kernel_facts.__wrapped__(source, options)
    # One file in the cache; the second call must not compile again.
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(nvrtc, "compile_source", None)  # a call would raise TypeError
    assert nvrtc.kernel_facts.__wrapped__(source, options) == facts
    with pytest.raises(TypeError):  # another option, another compilation
        nvrtc.kernel_facts.__wrapped__(source, ("-arch=sm_75",))


def test_threads_of_a_block(card):
    arguments = NUMBERS, np.float64(0), np.int64(8), empty((8,), np.bool_)
    kernel = planted("plain", card)
    kernel((1,), (1024,), arguments)
    kernel((1,), (32, 4, 8), arguments)  # 32 * 4 * 8 = 1024
    with refused("threads of a block", 1025, 1024):
        kernel((1,), (1025,), arguments)
    with refused("threads of a block", 1056, 1024):  # 33 * 4 * 8
        kernel((1,), (33, 4, 8), arguments)
    with pytest.raises(LaunchError, match="is empty"):
        kernel((1,), (0,), arguments)


def test_launch_bounds(card):
    kernel = planted("bounded", card)
    kernel((1,), (512,), (NUMBERS,))
    with refused(rf"bounded on {card.name}: threads of a block", 513, 512):
        kernel((1,), (513,), (NUMBERS,))


def test_registers(card):
    # 128 per thread: an SM has as many as 512 threads need.
    kernel = planted("wide", card, bound=None, registers=128)
    kernel((1,), (512,), (empty((8,), np.float32),))
    # 513 threads occupy 17 warps, as 544 threads do.
    with refused("registers of a block", 128 * 544, 65_536):
        kernel((1,), (513,), (empty((8,), np.float32),))
    # Registers are allocated 256 per warp, which is 8 per thread: 129 become 136.
    kernel = planted("wide", card, bound=None, registers=129)
    # 12 warps of 136 * 32 registers fit.
    kernel((1,), (384,), (empty((8,), np.float32),))
    with refused("registers of a block", 136 * 512, 65_536):
        kernel((1,), (512,), (empty((8,), np.float32),))


def test_compiled_registers(card):
    """Without its launch bounds the compiler's own count rules out 1024 threads."""
    kernel = planted("wide", card, bound=None)
    with pytest.raises(LaunchError, match="registers of a block"):
        kernel((1,), (1024,), (empty((8,), np.float32),))


def test_grids(card):
    kernel = planted("bounded", card)
    kernel((2**31 - 1, 65_535, 65_535), (1,), (NUMBERS,))  # the largest grid
    with refused("blocks in x", 2**31, 2**31 - 1):
        kernel((2**31,), (1,), (NUMBERS,))
    for axis in (1, 2):
        grid = [1, 1, 1]
        grid[axis] = 65_536
        with refused(f"blocks in {'xyz'[axis]}", 65_536, 65_535):
            kernel(grid, (1,), (NUMBERS,))
    with pytest.raises(LaunchError, match="is empty"):
        kernel((0,), (1,), (NUMBERS,))


def test_default_shared_memory(card):
    kernel, limit = planted("shared", card), 48 * 1024 - 400
    assert kernel.shared_size_bytes == 400
    assert kernel.max_dynamic_shared_size_bytes == limit
    kernel((1,), (32,), (NUMBERS,), shared_mem=limit)
    with refused("bytes of shared memory", 49_153, 49_152):
        kernel((1,), (32,), (NUMBERS,), shared_mem=limit + 1)


def test_shared_memory_that_is_asked_for(card):
    limit = OPT_IN[card.name]
    kernel = planted("shared", card)
    # The static 400 bytes count too.
    with refused("bytes of shared memory asked for", limit + 1, limit):
        kernel.max_dynamic_shared_size_bytes = limit - 399
    with refused("bytes of shared memory", 50_400, 49_152):  # the attribute is not set
        kernel((1,), (32,), (NUMBERS,), shared_mem=50_000)
    kernel.max_dynamic_shared_size_bytes = limit - 400
    kernel((1,), (32,), (NUMBERS,), shared_mem=limit - 400)
    # A launch is checked against the latest value, even if an earlier one was
    # larger.
    kernel.max_dynamic_shared_size_bytes = 50_000
    kernel((1,), (32,), (NUMBERS,), shared_mem=50_000)
    with refused("bytes of shared memory", 50_401, 50_400):
        kernel((1,), (32,), (NUMBERS,), shared_mem=50_001)


def test_cooperative_grids(card):
    kernel = planted("waiting", card, cooperative=True, registers=32)
    arguments = np.int64(4), NUMBERS
    resident = RESIDENT[card.name]
    kernel((resident,), (1024,), arguments)
    with refused("blocks of a cooperative launch", resident + 1, resident):
        kernel((resident + 1,), (1024,), arguments)
    # A launch that is not cooperative may have one block at the barrier, not two.
    alone = planted("waiting", card)
    alone((4,), (32,), (np.int64(1), NUMBERS))
    with pytest.raises(LaunchError, match="2 blocks wait for each other"):
        alone((4,), (32,), (np.int64(2), NUMBERS))


def test_occupancy():
    """The values of NVIDIA's occupancy calculator."""
    assert blocks_per_sm(75, 256, 32, 0) == 4  # 1024 threads / 256
    assert blocks_per_sm(80, 256, 32, 0) == 8  # 2048 threads / 256
    # 64 registers * 32 lanes * 8 warps = 16,384 per block, of 65,536.
    assert blocks_per_sm(80, 256, 64, 0) == 4
    assert blocks_per_sm(80, 256, 33, 0) == 6  # 33 registers become 40
    assert blocks_per_sm(80, 64, 16, 0) == 32  # the limit of blocks
    assert blocks_per_sm(86, 1024, 32, 0) == 1
    assert blocks_per_sm(90, 128, 32, 48 << 10) == 4  # 49 KB each, of 228
    assert blocks_per_sm(75, 128, 32, 32 << 10) == 2  # 32 KB each, of 64
    # 72 * 1024 registers are more than 65,536.
    assert blocks_per_sm(80, 1024, 65, 0) == 0


GOOD = [NUMBERS, np.float64(1), np.int64(8), empty((8,), np.bool_)]


@pytest.mark.parametrize(
    ("index", "argument", "message"),
    [
        (0, empty((8,), np.int64), r"int32\* x \(.u64\), got int64\*"),
        (0, np.zeros(8, np.int32), "got the host's ndarray"),
        (0, empty((8, 2), np.int32)[:, 0], "argument 0, x, is strided"),
        (0, np.uint64(8), r"int32\* x \(.u64\), got uint64"),
        (1, np.float32(1), r"float64 a \(.f64\), got float32"),
        (1, 1.0, "got the host's float"),
        (2, np.int32(8), r"int64 n \(.u64\), got int32"),
        (2, np.float64(8), "got float64"),
        (2, NUMBERS, r"int64 n \(.u64\), got int32\*"),
        (3, empty((8,), np.int8), r"bool\* out \(.u64\), got int8\*"),
    ],
)
def test_arguments(index, argument, message):
    kernel = planted("plain", CARDS[0])
    kernel((1,), (32,), GOOD)
    kernel((1,), (32,), [np.uint64(0), *GOOD[1:]])  # a null pointer
    with pytest.raises(LaunchError, match=message):
        kernel((1,), (32,), [*GOOD[:index], argument, *GOOD[index + 1 :]])


def test_arguments_are_counted():
    kernel = planted("plain", CARDS[0])
    for arguments in (GOOD[:-1], [*GOOD, np.int64(0)]):
        with pytest.raises(
            LaunchError, match=f"takes 4 arguments, got {len(arguments)}"
        ):
            kernel((1,), (32,), arguments)


# The check of arguments relies on both: the source for types, the PTX for widths.
@pytest.mark.slow("compiles every kernel")
@pytest.mark.machine_code
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "tf32"])
def test_sources_declare_what_is_compiled(dtype):
    for file in files(dtype):
        facts = facts_of(file, dtype, 80)
        assert set(facts) == set(cuda.kernel_names(file))
        for kernel in facts:
            declared = parameters_of(cuda.source(file), kernel, dtype)
            compiled = [
                "f64" if x.dtype == "float64" and not x.pointer else "u64"
                for x in declared
            ]
            assert compiled == facts[kernel].parameters


# Python and CUDA get the number of threads from one constant: a second number in
# the source would not change with it.
@pytest.mark.slow("compiles kernels")
@pytest.mark.machine_code
@pytest.mark.parametrize(
    ("constant", "value", "file", "kernel"),
    [
        ("SELECTION_THREADS", 256, "select_tokens", "top_tokens"),
        ("GROUP_THREADS", 256, "labels", "number_groups"),
        ("GROUP_THREADS", 256, "bipartite", "match_counts"),
        ("LINKAGE_THREADS", {4: 256, 8: 256}, "single_linkage", "single_linkage"),
    ],
)
def test_launch_bounds_follow_the_launchers(constant, value, file, kernel, monkeypatch):
    before = facts_of(f"optimized/{file}", "float32", 80)[kernel].bound
    current = getattr(cuda, constant)
    assert before == (current[4] if isinstance(current, dict) else current)
    monkeypatch.setattr(cuda, constant, value)
    after = facts_of(f"optimized/{file}", "float32", 80)[kernel].bound
    assert after == (value[4] if isinstance(value, dict) else value)


def test_tiles_have_the_threads_that_launchers_give_them(monkeypatch):
    # Tiles are laid out for 256 threads, so any other number must not compile.
    monkeypatch.setattr(cuda, "BLOCK", 128)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        facts_of("optimized/linear", "float32", 80)


# real_t is the storage dtype, acc_t the accumulation dtype.
def test_types_follow_the_dtype():
    def types(dtype):
        source = cuda.source("optimized/merge_tokens")
        return [x.dtype for x in parameters_of(source, "merge_tokens", dtype)[:2]]

    assert types("bfloat16") == ["bfloat16", "float32"]
    assert types("float64") == ["float64", "float64"]
    assert types("tf32") == ["float32", "float32"]


def test_arrays_of_the_device():
    x = empty((4, 3), np.float32)
    assert x.flags.c_contiguous
    # Results of operations stay on the device.
    assert type((x + 1)[0]) is type(np.stack([x, x])) is type(x.sum()) is DeviceArray
    for mix in (lambda: x + np.ones(3), lambda: np.stack([x, np.ones((4, 3))])):
        with pytest.raises(MixedArraysError):
            mix()
    assert empty((1 << 15, 1 << 20), np.uint8).nbytes == 1 << 35  # uses no memory
    with pytest.raises(MemoryError, match="no card has 256 GiB"):
        empty((1 << 18, 1 << 20), np.uint8)


def test_reads_are_counted():
    x, mask = to_device(np.arange(3.0)), to_device(np.ones(3, np.bool_))
    READS.clear()
    assert (x + 1).sum().shape == ()  # work on the device alone
    assert READS == []
    # Each of these four would make the host wait for the GPU.
    assert float(x.sum()) == 3
    assert x.max() > 1
    assert x[mask].size == 3
    x[mask] = 0
    assert READS == ["__float__", "__bool__", "x[mask]", "x[mask] = value"]
