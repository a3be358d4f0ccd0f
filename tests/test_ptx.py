"""The interpreter of PTX: its results are exact, and it reports faults.

Values are compared with NumPy. Each fault is a small kernel that is wrong in one way;
the test checks the message. Most of these kernels would run on a GPU without an error.
"""

import ml_dtypes
import numpy as np
import ptx
import pytest
from seam import cuda

from qm_cupy.stages.clustering import linkage_cuda

FOLDER = cuda._folder()
COMMON = (FOLDER / "common.cuh").read_text(encoding="utf-8")
TENSOR_CORE = (FOLDER / "optimized/tensor_core.cuh").read_text(encoding="utf-8")


def kernel(body, name="probe", dtype="float32", arch=90):
    """Compile a kernel of a source that may use the library's device functions."""
    return ptx.Module(COMMON + TENSOR_CORE + body, dtype, arch).kernel(name)


def probe(statements, parameters="float* out", **options):
    """Compile a kernel `probe` with a body of some statements."""
    text = f'extern "C" __global__ void probe({parameters}) {{ {statements} }}'
    return kernel(text, **options)


def run(statements, size=256, block=64, grid=1, **options):
    """Run statements that write to `out`, (size,) float32."""
    out = ptx.empty((size,), np.float32)
    probe(statements)((grid,), (block,), (out,), **options)
    return out


# ---- values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_types_round_as_numpy_and_ml_dtypes_do(dtype):
    storage = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    index = "const long long i = blockIdx.x * 256ll + threadIdx.x;"
    widen = probe(
        f"{index} out[i] = widen(x[i]);", "const real_t* x, float* out", dtype=dtype
    )
    # Widening: all 65,536 values, NaNs and subnormals included.
    every = np.arange(2**16, dtype=np.uint16).view(storage)
    wide = ptx.empty(every.shape, np.float32)
    widen((256,), (256,), (every, wide))
    np.testing.assert_array_equal(wide, every.astype(np.float32))

    narrow = probe(
        f"{index} store(out + i, x[i]);", "const float* x, real_t* out", dtype=dtype
    )
    # Narrowing: random floats, and every midpoint of two neighbours, where rounding to
    # nearest even decides.
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    with np.errstate(all="ignore"):
        ties = (wide[:-1].astype(np.float64) + wide[1:]) / 2
        x = np.concatenate([bits.view(np.float32), ties.astype(np.float32), [0]])
        x = np.where(np.isnan(x), 0, x).astype(np.float32)
        wanted = x.astype(storage)
    got = ptx.empty(x.shape, storage)
    narrow((x.size // 256,), (256,), (x, got))
    np.testing.assert_array_equal(got.view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_subnormals_are_flushed_as_cupy_compiles_them(dtype):
    """Only float flushes: in comparisons, inputs and results, but not in copies."""
    flush = probe(
        """
        out[0] = x[0];
        out[1] = x[0] == 0;
        out[2] = x[1] * acc_t(0.5);
        out[3] = max(x[0], acc_t(0));
        out[4] = x[0] * acc_t(1e9);
        """,
        "const acc_t* x, acc_t* out",
        dtype=dtype,
    )
    wide = np.dtype(np.float64 if dtype == "float64" else np.float32)
    tiny = np.finfo(wide).tiny  # the least normal number: a quarter of it is subnormal
    x, out = np.array([tiny / 4, tiny], wide), ptx.empty((5,), wide)
    flush((1,), (1,), (x, out))
    # float64 keeps subnormals. Otherwise the copy keeps x[0], the comparison with 0 is
    # true, and the other three results are 0.
    kept = [x[0], 0, tiny / 2, x[0], x[0] * wide.type(1e9)]
    wanted = kept if dtype == "float64" else [x[0], 1, 0, 0, 0]
    np.testing.assert_array_equal(out, np.array(wanted, wide))


FUNCTIONS = {
    "exp(x)": np.exp,
    "log(fabs(x))": lambda x: np.log(abs(x)),
    "log1p(fabs(x))": lambda x: np.log1p(abs(x)),
    "sqrt(fabs(x))": lambda x: np.sqrt(abs(x)),
    "sin(x)": np.sin,
    "cos(x)": np.cos,
    "1 / x": lambda x: 1 / x,
    "tanh(x)": np.tanh,
    "floor(x)": np.floor,
    "rint(x)": np.rint,
    "fmod(x, acc_t(0.75))": lambda x: np.fmod(x, 0.75),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_agree_with_numpy(dtype):
    stores = "".join(
        f"out[{n} * 64 + threadIdx.x] = {f};" for n, f in enumerate(FUNCTIONS)
    )
    functions = probe(
        f"const acc_t x = in[threadIdx.x]; {stores}",
        "const acc_t* in, acc_t* out",
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    # 57 + 7 = 64 inputs, one for each thread.
    x = np.concatenate([rng.normal(size=57) * 3, [1e-3, 20, -20, 0.5, 1, 80, -80]])
    x = x.astype(dtype)
    out = ptx.empty((len(FUNCTIONS), 64), x.dtype)
    functions((1,), (64,), (x, out))
    # CUDA's functions are accurate to a few units in the last place, not exact.
    wanted = np.stack([f(x.astype(np.float64)) for f in FUNCTIONS.values()])
    tolerance = 4e-15 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(out, wanted, rtol=tolerance, atol=tolerance / 4)


def test_integers():
    integers = probe(
        """
        const int i = threadIdx.x;
        long long* o = out + i * 9;
        const unsigned x = a[i], y = b[i];
        o[0] = a[i] / b[i];
        o[1] = a[i] % b[i];
        o[2] = __mul64hi(a[i], b[i]);
        o[3] = __umulhi(x, y);
        o[4] = a[i] >> (b[i] & 63);
        o[5] = __clzll(a[i]);
        o[6] = __popc(x) + 100 * __ffs(y);
        o[7] = __brev(x);
        o[8] = (int)x / 7 + (int)y % 5;
        """,
        "const long long* a, const long long* b, long long* out",
    )
    rng = np.random.default_rng(0)
    a = rng.integers(-(2**63), 2**63, 32)
    b = rng.integers(1, 2**40, 32) * rng.choice([-1, 1], 32)
    out = ptx.empty((32, 9), np.int64)
    integers((1,), (32,), (a, b, out))

    def divided(p, q):
        # C rounds a quotient towards zero, Python rounds it down.
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for row, p, q in zip(out.tolist(), a.tolist(), b.tolist(), strict=True):
        # The lower 32 bits, without sign and as a signed number.
        x, y = p & 0xFFFFFFFF, q & 0xFFFFFFFF
        sx, sy = (x ^ 2**31) - 2**31, (y ^ 2**31) - 2**31
        assert row == [
            divided(p, q),
            p - divided(p, q) * q,
            p * q >> 64,
            x * y >> 32,
            p >> (q & 63),
            64 - (p % 2**64).bit_length(),
            x.bit_count() + 100 * (y & -y).bit_length(),
            int(f"{x:032b}"[::-1], 2),
            divided(sx, 7) + sy - divided(sy, 5) * 5,
        ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_and_ldmatrix_make_a_matrix_product(dtype):
    """ldmatrix loads the fragments in the layout that the PTX ISA's tables give."""
    product = probe(
        """
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
        """,
        "const real_t* a, const real_t* b, float* c",
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    storage = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    # Small integers: all products and sums are exact, so the order cannot matter.
    a = rng.integers(-8, 9, (16, 16)).astype(storage)
    b = rng.integers(-8, 9, (8, 16)).astype(storage)
    c = ptx.empty((16, 8), np.float32)
    product((1,), (32,), (a, b, c))
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def test_mma_of_tf32_drops_the_last_bits():
    product = probe(
        """
        const int row = threadIdx.x / 4, k = threadIdx.x % 4;
        unsigned x[4], y[2];
        for (int i = 0; i < 4; ++i)
            x[i] = __float_as_uint(a[(row + i % 2 * 8) * 8 + k + i / 2 * 4]);
        for (int i = 0; i < 2; ++i) y[i] = __float_as_uint(b[row * 8 + k + i * 4]);
        float d[4] = {};
        mma_16x8(d[0], d[1], d[2], d[3], x, y, float());
        for (int i = 0; i < 4; ++i)
            c[(row + i / 2 * 8) * 8 + k * 2 + i % 2] = d[i];
        """,
        "const float* a, const float* b, float* c",
    )
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    b = rng.integers(-8, 9, (8, 8)).astype(np.float32)
    c = ptx.empty((16, 8), np.float32)
    # TF32 keeps 10 bits behind the point: both factors add bits that it drops.
    product((1,), (32,), (a * np.float32(1 + 2**-11), b * np.float32(1 + 2**-12), c))
    np.testing.assert_array_equal(c, a @ b.T)


def test_shuffles_votes_and_matches():
    """Diverged lanes also shuffle, each group with its own mask."""
    together = probe(
        """
        const int lane = threadIdx.x, mine = x[lane];
        const unsigned peers = __match_any_sync(~0u, mine);
        out[lane] = peers;
        out[32 + lane] = __ballot_sync(~0u, mine > 2);
        out[64 + lane] = __shfl_up_sync(~0u, mine, 3);
        if (lane < 16) out[96 + lane] = __shfl_xor_sync(0xffffu, mine, 5);
        else out[96 + lane] = __shfl_down_sync(0xffff0000u, mine, 2);
        """,
        "const int* x, unsigned* out",
    )
    x = np.random.default_rng(0).integers(0, 5, 32, dtype=np.int32)
    out = ptx.empty((4, 32), np.uint32)
    together((1,), (32,), (x, out))
    powers = 1 << np.arange(32, dtype=np.uint64)
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], ((x[:, None] == x) * powers).sum(1))
    np.testing.assert_array_equal(out[1], np.full(32, ((x > 2) * powers).sum()))
    np.testing.assert_array_equal(out[2], x[np.where(lane < 3, lane, lane - 3)])
    down = np.where(lane < 30, lane + 2, lane)
    np.testing.assert_array_equal(out[3], x[np.where(lane < 16, lane ^ 5, down)])


def test_dynamic_shared_memory_is_as_large_as_the_launch_says():
    text = """
        auto* shared = reinterpret_cast<float*>(dynamic_shared());
        shared[threadIdx.x] = threadIdx.x;
        __syncthreads();
        out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
    """
    out = run(text, 64, shared_mem=256)  # 64 floats
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
    with pytest.raises(ptx.LaunchError, match="shared byte 128 of 128"):
        run(text, shared_mem=128)


# ---- faults

# Thread t works with s[t]. Two warps of 32 threads use an array of 64 elements, so
# (t + 32) % 64 is an element of the other warp, and t ^ 1 one of the same warp.
RACES = {
    "no barrier": (
        "s[t] = t; out[t] = s[(t + 32) % 64];",
        # Warp 0 runs first, so warp 1 has not written yet.
        "read of shared bytes never written",
    ),
    "a write too early": (
        "s[t] = t; __syncthreads(); out[t] = s[(t + 32) % 64]; s[t] = 0;",
        "read of bytes that another warp wrote",
    ),
    "two writers": (
        "s[t % 32] = t; __syncthreads(); out[t] = s[t % 32];",
        "write to bytes that another warp wrote",
    ),
    "no __syncwarp": (
        "s[t] = t; out[t] = reinterpret_cast<volatile float*>(s)[t ^ 1];",
        "read of bytes that another lane wrote",
    ),
    "a write too early within a warp": (
        "s[t] = t; __syncwarp(); out[t] = s[t ^ 1]; s[t] = 0;",
        "write to bytes that another lane read",
    ),
    "a reader of an atomic": (
        "n[t] = 0; __syncthreads(); atomicAdd(n, 1); out[t] = n[0];",
        "that an atomic changed",
    ),
}


@pytest.mark.parametrize("race", RACES)
def test_races_in_shared_memory(race):
    statements, message = RACES[race]
    declared = (
        "__shared__ float s[64]; __shared__ int n[64]; const int t = threadIdx.x;"
    )
    with pytest.raises(ptx.LaunchError, match=message):
        run(declared + statements)


def test_barriers_order_accesses_that_would_race():
    """The accesses of `RACES`, with all the barriers that they need."""
    out = run("""
        __shared__ float s[64];
        __shared__ int n;
        const int t = threadIdx.x;
        if (t == 0) n = 0;
        s[t] = t;
        __syncthreads();
        atomicAdd(&n, 1);
        out[t] = s[(t + 32) % 64];
        __syncthreads();
        s[t] = n;
        __syncwarp();
        out[t + 64] = s[t ^ 1];
    """)
    np.testing.assert_array_equal(out[:64], np.roll(np.arange(64), -32))
    np.testing.assert_array_equal(out[64:128], np.full(64, 64))  # 64 atomic additions


# Statements of threads 0 and 32 of each block, where b is the number of the block.
BETWEEN_BLOCKS = {
    "read": "out[b] = 1; if (b) out[8 + b] = out[b - 1];",
    "write after read": "out[8 + b] = b ? 0 : out[3]; if (b == 3) out[3] = 1;",
    "write": "out[0] = b;",
    "atomic and write": "if (b) out[0] = 1; else atomicAdd(out, 1.f);",
    "within a block": "if (threadIdx.x == 0) out[0] = 1; else out[b + 1] = out[0];",
}


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("__syncwarp();", None),
        ("__syncthreads();", None),
        ("", "read of an element that another lane of the warp has written"),
        # A shuffle waits for other lanes, but it does not order their memory accesses.
        ("__shfl_sync(~0u, t, 0);", "another lane of the warp"),
    ],
)
def test_lanes_of_a_warp_race_in_global_memory(between, message):
    body = f"const int t = threadIdx.x; out[t] = t; {between} out[64 + t] = out[t ^ 1];"
    if message:
        with pytest.raises(ptx.LaunchError, match=message):
            run(body)
    else:
        np.testing.assert_array_equal(run(body)[64:128], np.arange(64) ^ 1)


def test_an_atomic_after_a_store_of_another_warp_races():
    """Without a barrier the count could lose the arrivals before the store of 0."""
    body = """__shared__ int n; const int t = threadIdx.x;
        if (t == 0) n = 0;
        BARRIER if (t % 32 == 0) atomicAdd(&n, 1);
        __syncthreads(); out[t] = n;"""
    assert (run(body.replace("BARRIER", "__syncthreads();"))[:64] == 2).all()
    with pytest.raises(ptx.LaunchError, match="atomic on bytes that another warp"):
        run(body.replace("BARRIER", ""))


@pytest.mark.parametrize("race", BETWEEN_BLOCKS)
def test_races_in_global_memory(race):
    body = "const int b = blockIdx.x; if (threadIdx.x % 32) return;"
    grid = 1 if race == "within a block" else 4
    out = np.zeros(16, np.float32)
    with pytest.raises(ptx.LaunchError, match="race in global memory"):
        probe(body + BETWEEN_BLOCKS[race])((grid,), (64,), (out,))


def test_atomics_of_blocks_do_not_race():
    out = np.zeros(2, np.float32)
    probe("atomicAdd(out, 1.f);")((5,), (64,), (out,))
    assert out[0] == 320  # 5 blocks of 64 threads


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ("out[256] = 1;", "0 bytes behind an array of 1024"),
        ("out[-1] = 1;", "4 bytes before an array|outside all arrays"),
        ("*reinterpret_cast<float4*>(out + 1) = float4();", "misaligned access of 16"),
        ("out[0] = out[1];", "read of global memory never written"),
        # A vector whose first element alone was written.
        (
            "out[0] = 1; const float4 v = *(float4*)out; out[4] = v.x + v.w;",
            "read of global memory never written",
        ),
        # Addresses of shared memory have 32 bits: -4 is 2^32 - 4.
        (
            "__shared__ int s[4]; out[0] = s[-1 - (int)blockIdx.x];",
            "shared byte 4294967292 of 16",
        ),
        (
            "float a[4]; for (int i = 0; i < 4; ++i) a[i] = i;"
            " out[0] = a[(int)threadIdx.x - (int)blockDim.x];",
            "local bytes",
        ),
        ("__shared__ int s[4]; out[0] = s[threadIdx.x % 4];", "never written"),
        ("__shared__ float s[4]; out[0] = s[threadIdx.x % 4];", "never written"),
    ],
)
def test_wrong_accesses(statements, message):
    with pytest.raises(ptx.LaunchError, match=message):
        run(statements, block=1)


def test_constant_arrays_are_not_written():
    # A GPU would write: `const` is a promise of the source alone.
    write = probe("const_cast<float*>(in)[0] = 1;", "const float* in")
    with pytest.raises(ptx.LaunchError, match="write to constant memory"):
        write((1,), (1,), (np.zeros(4, np.float32),))


# Each of 32 threads copies 4 floats and reads 4 floats of the next thread.
COPY = """
    __shared__ __align__(16) float s[128];
    const int t = threadIdx.x;
    cp_async<16>(s + 4 * t, in + 4 * t);
    cp_async_commit();
    WAIT
    for (int i = 0; i < 4; ++i) out[4 * t + i] = s[(4 * t + i + 4) % 128];
"""


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        ("cp_async_wait<0>(); __syncthreads();", None),
        ("__syncthreads();", "has not been waited for"),
        # The newest group may still be in flight.
        ("cp_async_wait<1>(); __syncthreads();", "has not been waited for"),
        # A wait covers the thread's own copies; a barrier orders those of others.
        ("cp_async_wait<0>();", "that another lane wrote"),
    ],
)
def test_copies_arrive_at_the_wait(wait, message):
    copy = probe(COPY.replace("WAIT", wait), "const float* in, float* out")
    x, out = np.arange(132, dtype=np.float32), ptx.empty((128,), np.float32)
    x = x[-x.ctypes.data % 16 // 4 :][:128]  # cp.async of 16 bytes needs alignment
    if message:
        with pytest.raises(ptx.LaunchError, match=message):
            copy((1,), (32,), (x, out))
    else:
        copy((1,), (32,), (x, out))
        np.testing.assert_array_equal(out, np.roll(x, -4))


def test_copies_of_no_bytes_are_zeros_and_read_nothing():
    copy = probe(
        """
        __shared__ __align__(16) float s[128];
        const int t = threadIdx.x;
        cp_async_or_zeros<16>(s + 4 * t, in + 4 * t, t < 5);
        cp_async_commit();
        cp_async_wait<0>();
        for (int i = 0; i < 4; ++i) out[4 * t + i] = s[4 * t + i];
        """,
        "const float* in, float* out",
    )
    x, out = np.arange(24, dtype=np.float32), ptx.empty((128,), np.float32)
    x = x[-x.ctypes.data % 16 // 4 :][:20]
    # 5 threads copy 20 floats. The other threads' sources lie outside the array.
    copy((1,), (32,), (x, out))
    np.testing.assert_array_equal(out, np.pad(x, (0, 108)))


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_with_nan_are_nan(name):
    """Instructions min.NaN and max.NaN; plain min and max return the number."""
    values = np.array([1, -2, np.nan, np.nan], np.float32)
    text = f'asm("{name}.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(in[t]), "f"(in[3 - t]));'
    least = probe(
        f"const int t = threadIdx.x; float y; {text} out[t] = y;",
        "const float* in, float* out",
    )
    out = ptx.empty((4,), np.float32)
    least((1,), (4,), (values, out))
    assert np.isnan(out).all()
    values[2:] = 3, 4  # now all are numbers
    least((1,), (4,), (values, out))
    wanted = getattr(np, f"{name}imum")(values, values[::-1])
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("if (threadIdx.x < 63) __syncthreads();", "1 have returned|never arrive"),
        ("if (threadIdx.x == 5) return; __syncthreads();", "1 have returned"),
        ("if (threadIdx.x == 7) for (;;) __nanosleep(0);", "does not|no running"),
        ("out[0] = __shfl_xor_sync(0xffff, threadIdx.x, 1);", "own member mask"),
        (
            "int x = threadIdx.x; if (x < 16) x = __shfl_xor_sync(0xffff, x, 16);"
            "out[threadIdx.x] = x;",
            "which is not active",
        ),
    ],
)
def test_threads_that_do_not_synchronise(statement, message):
    """Barriers and collectives that some thread does not reach, and endless waiting."""
    if "nanosleep" in statement:  # an endless loop, which needs a pointer to poll
        statement = "volatile float* o = out; if (threadIdx.x == 7) while (*o == 0);"
    with pytest.raises(ptx.LaunchError, match=message):
        probe(statement)((1,), (64,), (np.zeros(64, np.float32),))


# In each round, every block writes its number of the round and reads that of the next
# block. The first barrier orders the read after the write, the second one orders the
# write of the next round after the read.
TWO_BARRIERS = """
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


def test_blocks_of_a_cooperative_launch_synchronise():
    arrived, out = np.zeros(1, np.uint32), np.zeros(10, np.int32)
    run = kernel(TWO_BARRIERS)
    run((5,), (64,), (arrived, out, np.int64(3)), cooperative=True)
    np.testing.assert_array_equal(out, np.full(10, 2))  # the last round of 0, 1, 2
    assert arrived[0] == 5 * 2 * 3  # blocks, barriers of a round, rounds


def test_waiting_for_a_block_that_does_not_run_is_a_fault():
    """A normal launch runs one block at a time; other blocks may also end early."""
    args = np.zeros(1, np.uint32), np.zeros(10, np.int32), np.int64(1)
    with pytest.raises(ptx.LaunchError, match="block never run"):
        kernel(TWO_BARRIERS)((5,), (64,), args)
    one_early = TWO_BARRIERS.replace("round < rounds", "round < rounds + blockIdx.x")
    with pytest.raises(ptx.LaunchError, match=r"block never run|race"):
        kernel(one_early)((5,), (64,), args, cooperative=True)


BARRIER = COMMON[COMMON.index("void blocks_barrier") :]
NEXT = "if (threadIdx.x == 0) out[gridDim.x + blockIdx.x] = out[next];"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        __threadfence();  // others see", "        // others see"),
        ("        __threadfence();  // this block sees", "        // this block sees"),
        ("{\n    __syncthreads();\n", "{\n"),
        ("    }\n    __syncthreads();\n", "    }\n"),
    ],
    ids=["no release", "no acquire", "no barrier before", "no barrier after"],
)
def test_a_barrier_of_blocks_needs_each_of_its_parts(old, new):
    """Without any one of its fences and __syncthreads, the blocks race."""
    assert BARRIER.count(old) == 1
    # Thread 40 is in another warp than thread 0, which waits in the barrier.
    body = TWO_BARRIERS.replace("threadIdx.x == 0", "threadIdx.x == 40")
    text = COMMON.replace(BARRIER, BARRIER.replace(old, new)) + body
    args = np.zeros(1, np.uint32), np.zeros(10, np.int32), np.int64(2)
    with pytest.raises(ptx.LaunchError, match="race in global memory"):
        ptx.Module(text, "float32").kernel("probe")((5,), (64,), args, cooperative=True)


# In the linkage kernel: the barrier of the team before it reads published neighbours.
SYNC = "                sync();\n            const int buffer"


@pytest.mark.parametrize(
    "new",
    [SYNC, SYNC.replace("sync()", "__syncthreads()")],
    ids=["whole", "no barrier of blocks"],
)
def test_a_linkage_whose_blocks_do_not_synchronise(new, monkeypatch):
    """The kernel is correct as it is, and races without one barrier of its blocks."""
    source = cuda.source("optimized/linkage")
    assert source.count(SYNC) == 1
    linkage = ptx.module(source.replace(SYNC, new), "float32").kernel("linkage")
    ptx.install(monkeypatch)
    monkeypatch.setattr(cuda, "raw_kernel", lambda *_: ptx.Handle(linkage, True))
    # Up to 3 blocks, one for each multiprocessor, work on the sequence. Each of them
    # has one warp.
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(3, 0))
    monkeypatch.setattr(linkage_cuda, "LINKAGE_THREADS", {4: 32})
    cosines = np.corrcoef(np.random.default_rng(0).random((8, 5))).astype(np.float32)
    if new == SYNC:
        linkage_cuda.linkage_cuda(cosines[None], "average")
    else:
        with pytest.raises(
            ptx.LaunchError, match=r"race in global memory|never written"
        ):
            linkage_cuda.linkage_cuda(cosines[None], "average")


# ---- launches


@pytest.mark.parametrize(
    "args",
    [
        (np.zeros(1, np.float64), np.int64(1)),  # an array of another type
        (np.zeros(1, np.float32), np.int32(1)),  # a scalar of another width
        (np.zeros(1, np.float32), 1),  # a scalar of no width
        (np.zeros(1, np.float32),),  # too few
        (np.zeros((2, 2), np.float32).T, np.int64(1)),  # not contiguous
    ],
)
def test_arguments_of_another_type_are_faults(args):
    with pytest.raises(ptx.LaunchError):
        probe("", "float* out, long long n")((1,), (1,), args)


def test_launch_bounds_and_limits_are_checked():
    bound = 'extern "C" __global__ void __launch_bounds__(64) probe(float* out) {}'
    out = (np.zeros(1, np.float32),)
    kernel(bound)((1,), (64,), out)
    with pytest.raises(ptx.LaunchError, match="launch bound is 64"):
        kernel(bound)((1,), (96,), out)
    large = probe("""
        __shared__ float s[12200];
        s[int(out[0])] = 1;
        __syncthreads();
        out[0] = s[threadIdx.x];
    """)
    assert large.shared_size_bytes == 48800  # 352 bytes less than 48 KB
    large((1,), (1,), out)
    with pytest.raises(ptx.LaunchError, match="dynamic shared memory"):
        large((1,), (1,), out, shared_mem=1024)


def test_a_fault_names_its_source():
    """The kernel, file and line, the instruction, the block and the thread."""
    with pytest.raises(
        ptx.LaunchError,
        match=r"probe: .*; .*:\d+, `st\.global.*` \(PTX line \d+\), block 1, thread 3",
    ):
        run("if (blockIdx.x == 1 && threadIdx.x == 3) out[999] = 0;", grid=2)
