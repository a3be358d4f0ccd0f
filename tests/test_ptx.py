"""The emulator itself: it must be exact, and must notice what a GPU would not say."""

import subprocess
import sys
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest

from qm_cupy import _cuda

HERE = Path(__file__).resolve().parent
COMMON = (_cuda._folder() / "common.cuh").read_text()


def kernel(body, name="probe", dtype="float32", **options):
    library = emulator.compile_source(COMMON + body, dtype, **options)
    return emulator.Kernel(library, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_types_round_as_numpy_and_ml_dtypes_do(dtype):
    convert = kernel(
        """
        extern "C" __global__ void widen_all(const real_t* x, long long n, float* out) {
            for (long long i = 0; i < n; ++i) out[i] = widen(x[i]);
        }
        extern "C" __global__ void narrow_all(const float* x, long long n,
                                              real_t* out) {
            for (long long i = 0; i < n; ++i) store(out + i, x[i]);
        }
        """,
        "widen_all",
        dtype,
    )
    storage = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    every = np.arange(2**16, dtype=np.uint16).view(storage)
    wide = emulator.empty(every.shape, np.float32)
    convert((1,), (1,), (every, np.int64(every.size), wide))
    np.testing.assert_array_equal(wide, every.astype(np.float32))

    narrow = emulator.Kernel(convert.library, "narrow_all")
    bits = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
    with np.errstate(all="ignore"):
        ties = (wide[:-1].astype(np.float64) + wide[1:]) / 2
        x = np.concatenate([bits.view(np.float32), ties.astype(np.float32)])
        wanted = x.astype(storage)
    x, wanted = x[~np.isnan(x)], wanted[~np.isnan(x)]
    got = emulator.empty(x.shape, storage)
    narrow((1,), (1,), (x, np.int64(x.size), got))
    np.testing.assert_array_equal(got.view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_subnormals_are_flushed_as_cupy_compiles_them(dtype):
    """float alone is flushed: in comparisons, sources and results, not in copies."""
    probe = kernel(
        """
        extern "C" __global__ void probe(const acc_t* x, acc_t* out) {
            out[0] = x[0];
            out[1] = x[0] == 0;
            out[2] = x[1] * acc_t(0.5);
            out[3] = max(x[0], acc_t(0));
            out[4] = x[0] * acc_t(1e9);
        }
        """,
        dtype=dtype,
    )
    wide = np.dtype(np.float64 if dtype == "float64" else np.float32)
    tiny = np.finfo(wide).tiny
    x, out = np.array([tiny / 4, tiny], wide), emulator.empty((5,), wide)
    probe((1,), (1,), (x, out))
    kept = [x[0], 0, tiny / 2, x[0], x[0] * wide.type(1e9)]
    wanted = kept if dtype == "float64" else [x[0], 1, 0, 0, 0]
    np.testing.assert_array_equal(out, np.array(wanted, wide))
    assert x[0] * wide.type(0.5) > 0  # the switch is back where it was


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_and_ldmatrix_make_a_matrix_product(dtype):
    """Fragments come by ldmatrix and lie as the PTX ISA's tables say."""
    product = kernel(
        """
        extern "C" __global__ void probe(const real_t* a, const real_t* b, float* c) {
            __shared__ __align__(16) real_t left[16 * 16], right[8 * 16];
            const int lane = threadIdx.x;
            for (int i = lane; i < 256; i += 32) left[i] = a[i];
            for (int i = lane; i < 128; i += 32) right[i] = b[i];
            __syncwarp();
            unsigned x[4], y[4];
            ldmatrix_x4(x, left + lane % 16 * 16 + lane / 16 * 8);
            ldmatrix_x4(y, right + lane % 8 * 16 + lane / 8 % 2 * 8);
            float d[4] = {};
            const unsigned strip[2] = {y[0], y[1]};
            mma_16x8(d[0], d[1], d[2], d[3], x, strip, real_t());
            for (int i = 0; i < 4; ++i)
                c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
        }
        """,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    storage = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    a = rng.integers(-8, 9, (16, 16)).astype(storage)
    b = rng.integers(-8, 9, (8, 16)).astype(storage)
    c = emulator.empty((16, 8), np.float32)
    product((1,), (32,), (a, b, c))
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def test_mma_of_tf32_drops_the_last_bits():
    product = kernel(
        """
        extern "C" __global__ void probe(const float* a, const float* b, float* c) {
            const int row = threadIdx.x / 4, k = threadIdx.x % 4;
            unsigned x[4], y[2];
            for (int i = 0; i < 4; ++i)
                x[i] = __float_as_uint(a[(row + i % 2 * 8) * 8 + k + i / 2 * 4]);
            for (int i = 0; i < 2; ++i) y[i] = __float_as_uint(b[row * 8 + k + i * 4]);
            float d[4] = {};
            mma_16x8(d[0], d[1], d[2], d[3], x, y, float());
            for (int i = 0; i < 4; ++i)
                c[(row + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
        }
        """
    )
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    b = rng.integers(-8, 9, (8, 8)).astype(np.float32)
    c = emulator.empty((16, 8), np.float32)
    product((1,), (32,), (a * np.float32(1 + 2**-11), b * np.float32(1 + 2**-12), c))
    np.testing.assert_array_equal(c, a @ b.T)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "if (threadIdx.x < 63) __syncthreads();",
            "not all threads reach __syncthreads",
        ),
        (
            "if (threadIdx.x == 5) return; __syncthreads();",
            "63 wait here, 1 have returned",
        ),
        ("if (threadIdx.x != 7) __syncwarp();", "not all threads reach __syncwarp"),
        (
            "if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();",
            "while other threads are at __syncthreads",
        ),
        ("__shfl_xor_sync(0xffff, 1.0f, 1);", "partial mask"),
    ],
)
def test_divergent_barriers_are_errors(statement, message):
    run = kernel(f'extern "C" __global__ void probe(float* out) {{ {statement} }}')
    with pytest.raises(emulator.EmulationError, match=message):
        run((1,), (64,), (np.zeros(1, np.float32),))


def test_shared_memory_is_poisoned_and_copies_are_late():
    run = kernel(
        """
        extern "C" __global__ void probe(const float4* in, float* out) {
            __shared__ __align__(16) float bytes[4];
            const bool left_over = bytes[0] == 5;
            cp_async<16>(bytes, in);
            cp_async_commit();
            out[0] = bytes[0];
            cp_async_wait<0>();
            out[1] = bytes[0];
            out[2] = left_over;
        }
    """.replace("const float4*", "const float*")
    )
    for _ in range(2):
        out = emulator.empty((3,), np.float32)
        whole = np.full(8, 5, np.float32)
        start = -whole.ctypes.data % 16 // 4
        run((1,), (1,), (whole[start : start + 4], out))
        assert np.isnan(out[0])
        assert out[1] == 5
        assert out[2] == 0


def test_dynamic_shared_memory_is_as_large_as_the_launch_says():
    run = kernel("""
        extern "C" __global__ void probe(float* out) {
            auto* shared = reinterpret_cast<float*>(dynamic_shared());
            out[0] = shared[threadIdx.x];
            shared[threadIdx.x] = threadIdx.x;
            __syncthreads();
            out[1 + threadIdx.x] = shared[31 - threadIdx.x];
        }
    """)
    out = emulator.empty((33,), np.float32)
    run((2,), (32,), (out,), shared_mem=128)
    assert np.isnan(out[0])
    np.testing.assert_array_equal(out[1:], np.arange(32)[::-1])


MEETING = """
    extern "C" __global__ void probe(unsigned* arrived, int* out, long long rounds) {
        for (int round = 0; round < rounds; ++round) {
            const int next = (blockIdx.x + 1) % gridDim.x;
            if (threadIdx.x == 0) out[blockIdx.x] = round;
            blocks_barrier(arrived, gridDim.x);
            if (threadIdx.x == 0) out[gridDim.x + blockIdx.x] = out[next];
            blocks_barrier(arrived, gridDim.x);
        }
    }
"""


def test_blocks_of_a_cooperative_launch_meet():
    arrived, out = np.zeros(1, np.uint32), np.zeros(10, np.int32)
    run = kernel(MEETING)
    run((5,), (64,), (arrived, out, np.int64(3)), cooperative=True)
    np.testing.assert_array_equal(out, np.full(10, 2))
    assert arrived[0] == 5 * 2 * 3


def test_blocks_that_are_not_there_never_meet():
    run = kernel(MEETING)
    args = np.zeros(1, np.uint32), np.zeros(10, np.int32), np.int64(1)
    with pytest.raises(emulator.EmulationError, match="blocks that never come"):
        run((5,), (64,), args)
    one_early = MEETING.replace("round < rounds", "round < rounds + blockIdx.x")
    with pytest.raises(emulator.EmulationError, match="blocks that never come"):
        kernel(one_early)((5,), (64,), args, cooperative=True)


def test_cooperative_blocks_have_shared_memory_of_their_own():
    own = """
        extern "C" __global__ void probe(unsigned* arrived, int* out) {
            int* mine = reinterpret_cast<int*>(dynamic_shared());
            mine[0] = blockIdx.x;
            blocks_barrier(arrived, gridDim.x);
            out[blockIdx.x] = mine[0];
        }
    """
    arrived, out = np.zeros(1, np.uint32), np.zeros(4, np.int32)
    kernel(own)((4,), (1,), (arrived, out), cooperative=True, shared_mem=4)
    np.testing.assert_array_equal(out, np.arange(4))
    static = own.replace(
        "int* mine = reinterpret_cast<int*>(dynamic_shared());",
        "__shared__ int mine[1];",
    )
    with pytest.raises(emulator.EmulationError, match="dynamic_shared"):
        kernel(static)((4,), (1,), (arrived, out), cooperative=True)


@pytest.mark.parametrize(
    "args",
    [
        (np.zeros(1, np.float64), np.int64(1)),  # an array of another type
        (np.zeros(1, np.float32), np.int32(1)),  # a scalar of another width
        (np.zeros(1, np.float32), 1),  # a scalar of no width
        (np.zeros(1, np.float32),),  # too few
    ],
)
def test_arguments_of_another_type_are_errors(args):
    run = kernel('extern "C" __global__ void probe(float* out, long long n) {}')
    with pytest.raises(emulator.EmulationError):
        run((1,), (1,), args)


def run_sanitized(sanitizer, script):
    """Run Python with a sanitizer's runtime in front; return its status and output."""
    done = subprocess.run(
        emulator.sanitized(sanitizer, sys.executable, "-c", script),
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


BROKEN = """
import numpy as np
import emulator
from qm_cupy import _cuda
source = _cuda.source("optimized/fidelity")
assert source.count({old!r}) == {count}
source = source.replace({old!r}, {new!r})
library = emulator.compile_source(source, "float32")
norms, selected = np.ones((2, 40), np.float32), np.ones((2, 40), bool)
out = np.empty(2, np.float32)
args = norms, selected, np.int64(2), np.int64(40), out
emulator.Kernel(library, "norm_mass")((2,), (64,), args)
assert (out == 1).all()
"""
BARRIER = "    __syncthreads();\n    x = scratch[0];"
STORE = "out[blockIdx.x] = total"


LINKAGE = """
import numpy as np
import emulator
from qm_cupy import _cuda, _linkage_cuda
source = _cuda.source("optimized/linkage")
assert source.count({old!r}) == 1
library = emulator.compile_source(source.replace({old!r}, {new!r}), "float32")
kernel = emulator.Kernel(library, "linkage")
run = lambda *args, **options: kernel(*args, cooperative=True, **options)
run.shared_size_bytes = 0
_cuda.raw_kernel = lambda *_: run
_cuda.empty, _cuda.to_device = emulator.empty, np.asarray
_cuda.device = lambda: _cuda.Device(3, 0)
_linkage_cuda.THREADS = {{4: 32}}
cosines = np.corrcoef(np.random.default_rng(0).random((8, 5))).astype(np.float32)
_linkage_cuda.linkage_cuda(cosines[None], "average")
"""
MEETS = "            meet();\n            if (first) plan_round"


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        (MEETS, "            if (first) plan_round", "ThreadSanitizer: data race"),
        (MEETS, MEETS, None),
    ],
    ids=["blocks-do-not-meet", "whole"],
)
def test_sanitizers_see_races_between_blocks(old, new, report):
    status, output = run_sanitized("thread", LINKAGE.format(old=old, new=new))
    assert (status == 0) == (report is None), output
    assert report is None or report in output


@pytest.mark.parametrize(
    ("sanitizer", "old", "new", "report"),
    [
        ("thread", BARRIER, "    x = scratch[0];", "ThreadSanitizer: data race"),
        ("address", STORE, "out[blockIdx.x + 1] = total", "heap-buffer-overflow"),
        ("thread", BARRIER, BARRIER, None),
        ("address", STORE, STORE, None),
    ],
    ids=["no-barrier", "off-by-one", "whole-thread", "whole-address"],
)
def test_sanitizers_catch_a_broken_kernel(sanitizer, old, new, report):
    status, output = run_sanitized(sanitizer, BROKEN.format(old=old, new=new, count=1))
    if report is None:
        assert status == 0, output
    else:
        assert status != 0
        assert report in output
