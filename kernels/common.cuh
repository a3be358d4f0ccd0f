// The opening of every kernel file: the loader puts this text in front of it.
//
//   -D real_t=...   what is stored:     __half, __nv_bfloat16, float or double
//   -D acc_t=...    what is computed:   float, or double where real_t is double
//   -D TF32=...     1 if floats may be multiplied as TF32, else 0
//   -D TILE=...     and the other numbers that Python shares: sizes, thresholds and
//                   enumerations (qm_cupy/cuda/constants.py)
//
// A kernel's integers are `long long`, its options `double`, its masks `bool` (True =
// token, null = all tokens), its labels `int` (-1 = padding), its counts `int` (K of
// each sequence, null = num_groups of all). Grids have one dimension. Nobody has looked
// at labels and counts: whatever they hold, no kernel leaves its arrays.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A score below all others, finite so that 0 * (score - m) is 0.
constexpr float MASKED_SCORE = -1e30f;

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) {
    *p = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }

// a * b rounded, which no fused multiply-add takes in: wherever a score is found again
// it has the same bits.
__device__ __forceinline__ float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}

__device__ __forceinline__ long long thread_index() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ bool is_token(const bool* mask, long long index) {
    return mask == nullptr || mask[index];
}

// The group of a token, or -1: for padding, and for a label that is no group's.
__device__ __forceinline__ int group_of(int label, long long num_groups) {
    return 0 <= label && label < num_groups ? label : -1;
}

// K of a sequence, within 0 .. num_groups.
__device__ __forceinline__ long long count_of(const int* counts, long long sequence,
                                              long long num_groups) {
    if (counts == nullptr) return num_groups;
    const long long count = counts[sequence];
    return count < 0 ? 0 : min(count, num_groups);
}

// What padding scores, -infinity: less than any token.
__device__ __forceinline__ acc_t padding() { return __uint_as_float(0xff800000u); }

// An unsigned integer for each score, in the order of the scores; -0 and 0 are equal.
// Scores are compared as these: a comparison of floats flushes subnormals to 0 (CuPy
// compiles with -ftz=true), so that NumPy's order of them would be lost.
__device__ __forceinline__ unsigned ordered_bits(float x) {
    unsigned bits = __float_as_uint(x);
    if (bits << 1 == 0) bits = 0;
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ unsigned long long ordered_bits(double x) {
    unsigned long long bits = __double_as_longlong(x);
    if (bits << 1 == 0) bits = 0;
    return bits >> 63 ? ~bits : bits | 1ull << 63;
}
using bits_t = decltype(ordered_bits(acc_t()));

// The entropy of softmax(scores) in one pass, in nats. The largest score m stays out of
//   r = sum e^(s - m),   t = sum e^(s - m) (s - m),
// so that H = log1p(r) - t / (1 + r) adds two terms >= 0 and nothing cancels, however
// far one score stands above the rest.
struct SoftmaxEntropy {
    acc_t m = MASKED_SCORE, r = 0, t = 0;

    __device__ __forceinline__ void add(acc_t score) {
        if (score > m) {
            *this = {score, 0, 0, *this};
        } else {
            const acc_t d = score - m;
            const acc_t e = exp(d);
            r += e;
            t += e * d;
        }
    }

    // Take in the terms of another state; the larger m of the two stays out.
    __device__ __forceinline__ void merge(const SoftmaxEntropy& other) {
        *this = other.m > m ? SoftmaxEntropy{other.m, other.r, other.t, *this}
                            : SoftmaxEntropy{m, r, t, other};
    }

    __device__ __forceinline__ acc_t value() const { return log1p(r) - t / (1 + r); }

    SoftmaxEntropy() = default;

    // (m, r, t) and the terms of a state whose largest score is at most m.
    __device__ __forceinline__ SoftmaxEntropy(acc_t m, acc_t r, acc_t t,
                                              const SoftmaxEntropy& lower)
        : m(m), r(r), t(t) {
        if (lower.m == MASKED_SCORE) return;  // it holds no score
        const acc_t d = lower.m - m;
        const acc_t e = exp(d);
        this->r += e * (1 + lower.r);
        this->t += e * (lower.t + d * (1 + lower.r));
    }
};

// Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): the first of the
// four words of counter (c0, c1, 0, c3) under a 64-bit key.
__device__ __forceinline__ unsigned philox4x32(unsigned c0, unsigned c1, unsigned c3,
                                               unsigned long long key) {
    unsigned c2 = 0;
    unsigned k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1;
        c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0;
}

// g = -log(-log u). u = (k + 1/2) 2^-23 is never 0 or 1, and the logarithms are taken
// in double and rounded once, so that the CPU finds the same bits.
__device__ __forceinline__ float gumbel(unsigned long long seed, long long sequence,
                                        long long token) {
    const auto low = static_cast<unsigned>(sequence);
    const auto high = static_cast<unsigned>(sequence >> 32);
    const unsigned k =
        philox4x32(static_cast<unsigned>(token), low, high, seed) >> (32 - NOISE_BITS);
    return static_cast<float>(-log(-log((k + 0.5) * (1.0 / (1 << NOISE_BITS)))));
}

// A row is read and written in vectors of 16 bytes where it can be.
constexpr int WIDTH = VECTOR_BYTES / sizeof(real_t);
struct __align__(VECTOR_BYTES) Vector {
    real_t element[WIDTH];
};

__device__ __forceinline__ bool is_whole(const void* address, long long left) {
    return left >= WIDTH && reinterpret_cast<unsigned long long>(address) % 16 == 0;
}

// The largest power of two, at most 16, that divides a number of bytes.
__device__ __forceinline__ int grain_of(unsigned long long bytes) {
    const int low = static_cast<int>(bytes) | 16;
    return low & -low;
}

// The widest access that is aligned and ends with the row, in bytes: all vectors of a
// row have the same.
__device__ __forceinline__ int grain_of(const real_t* address, long long left) {
    return grain_of(reinterpret_cast<unsigned long long>(address) |
                    static_cast<unsigned long long>(left) * sizeof(real_t));
}

template <class Piece>
__device__ __forceinline__ Vector read_pieces(const real_t* address, long long left) {
    constexpr int count = 16 / sizeof(Piece), each = WIDTH / count;
    union {
        Piece piece[count];
        Vector vector;
    };
#pragma unroll
    for (int i = 0; i < count; ++i)
        piece[i] =
            i * each < left ? reinterpret_cast<const Piece*>(address)[i] : Piece{};
    return vector;
}

// 16 bytes of a row whose elements of 16 bits are only aligned as such: by the aligned
// words among them, and single elements where no word is within the row.
__device__ __forceinline__ Vector read_halfwords(const real_t* address,
                                                 long long left) {
    const auto* element = reinterpret_cast<const unsigned short*>(address);
    const bool odd = reinterpret_cast<unsigned long long>(address) % 4 != 0;
    union {
        unsigned word[4];
        Vector vector;
    };
    if (left < WIDTH) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = 2 * i < left ? element[2 * i] : 0u;
            if (2 * i + 1 < left) word[i] |= unsigned(element[2 * i + 1]) << 16;
        }
    } else {
        const auto* aligned = reinterpret_cast<const unsigned*>(element + odd);
        const unsigned first = odd ? element[0] << 16 : aligned[0];
        const unsigned x = aligned[odd ? 0 : 1], y = aligned[odd ? 1 : 2];
        const unsigned z = aligned[odd ? 2 : 3], last = odd ? element[7] : 0u;
        word[0] = odd ? first >> 16 | x << 16 : first;
        word[1] = odd ? x >> 16 | y << 16 : x;
        word[2] = odd ? y >> 16 | z << 16 : y;
        word[3] = odd ? z >> 16 | last << 16 : z;
    }
    return vector;
}

// The next WIDTH of a row's `left` elements, zeros behind its end.
__device__ __forceinline__ Vector read_vector(const real_t* address, long long left) {
    if (is_whole(address, left)) return *reinterpret_cast<const Vector*>(address);
    const int grain = grain_of(address, left);
    if (grain >= 8) return read_pieces<uint2>(address, left);
    if (sizeof(real_t) == 4 || grain == 4) return read_pieces<unsigned>(address, left);
    return read_halfwords(address, left);
}

__device__ __forceinline__ void load_vector(acc_t (&x)[WIDTH], const real_t* address,
                                            long long left) {
    const Vector v = read_vector(address, left);
    for (int i = 0; i < WIDTH; ++i) x[i] = widen(v.element[i]);
}

template <class Piece>
__device__ __forceinline__ void write_pieces(real_t* address, const Vector& v,
                                             long long left) {
    constexpr int count = 16 / sizeof(Piece), each = WIDTH / count;
    union {
        Vector vector;
        Piece piece[count];
    };
    vector = v;
#pragma unroll
    for (int i = 0; i < count; ++i)
        if (i * each < left) reinterpret_cast<Piece*>(address)[i] = piece[i];
}

__device__ __forceinline__ void store_vector(real_t* address, const acc_t (&x)[WIDTH],
                                             long long left) {
    Vector v;
    for (int i = 0; i < WIDTH; ++i) store(&v.element[i], x[i]);
    if (is_whole(address, left)) {
        *reinterpret_cast<Vector*>(address) = v;
        return;
    }
    const int grain = grain_of(address, left);
    if (grain >= 8)
        write_pieces<uint2>(address, v, left);
    else if (sizeof(real_t) == 4 || grain == 4)
        write_pieces<unsigned>(address, v, left);
    else
        for (int i = 0; i < WIDTH && i < left; ++i) address[i] = v.element[i];
}

// What a layer does to its outputs: nothing, ReLU, or GELU (y times the normal
// distribution's share below y). GELU is called, not in line: a thread has 64 outputs.
__device__ __noinline__ acc_t gelu(acc_t y) {
    return y * (1 + erf(y * acc_t(0.7071067811865476))) / 2;
}
__device__ __forceinline__ acc_t activated(acc_t y, long long activation) {
    if (activation == RELU) return y < 0 ? acc_t(0) : y;
    return activation == GELU ? gelu(y) : y;
}

struct Add {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return a + b; }
};
struct Least {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return min(a, b); }
};
struct Greatest {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return max(a, b); }
};

// Every lane's value combined, the same in all lanes.
template <class Combine>
__device__ __forceinline__ acc_t warp_reduce(acc_t x, Combine combine) {
    for (int bits = 16; bits > 0; bits /= 2)
        x = combine(x, __shfl_xor_sync(~0u, x, bits));
    return x;
}

// Every thread's value combined, in a fixed order, the same in all threads. `scratch`
// is shared memory for 32 values.
template <class Combine>
__device__ __forceinline__ acc_t block_reduce(acc_t x, acc_t* scratch,
                                              Combine combine) {
    x = warp_reduce(x, combine);
    __syncthreads();  // the scratch may still be in use
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = scratch[min(lane, warps - 1)];
    for (int bits = 16; bits > 0; bits /= 2) {
        const acc_t other = __shfl_down_sync(~0u, x, bits);
        if (lane + bits < warps) x = combine(x, other);
    }
    return __shfl_sync(~0u, x, 0);
}

// The sum of the lanes up to this one.
__device__ __forceinline__ int sum_up_to_lane(int x) {
    const int lane = threadIdx.x % 32;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(~0u, x, delta);
        if (lane >= delta) x += other;
    }
    return x;
}

// The sum of the warps before this one; `total` is that of all warps. x is the same in
// all lanes, `scratch` is shared memory for 32 sums.
__device__ __forceinline__ int sum_of_warps_before(int x, int* scratch, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // the scratch may still be in use
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    const int other = lane < warps ? scratch[lane] : 0;
    const int up_to = sum_up_to_lane(other);
    *total = __shfl_sync(~0u, up_to, 31);
    return __shfl_sync(~0u, up_to - other, warp);
}

// The sum of the threads before this one; `total` is that of all threads.
__device__ __forceinline__ int block_sum_before(int x, int* scratch, int* total) {
    const int up_to = sum_up_to_lane(x);
    const int of_warp = __shfl_sync(~0u, up_to, 31);
    return sum_of_warps_before(of_warp, scratch, total) + up_to - x;
}

// How many threads before this one have `flag`; `total` is how many have it in all.
__device__ __forceinline__ int block_rank(bool flag, int* scratch, int* total) {
    const unsigned votes = __ballot_sync(~0u, flag);
    const int rank = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    return rank + sum_of_warps_before(__popc(votes), scratch, total);
}

// The shared memory whose size the launch gives, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char dynamic_bytes[];
    return dynamic_bytes;
}

// Wait until `num_blocks` blocks have come here as often as this one has. They are of a
// cooperative launch, so all of them are running; `arrived` counts them, from 0.
__device__ __forceinline__ void blocks_barrier(unsigned* arrived, unsigned num_blocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what this block wrote, before its arrival is seen
        const unsigned ticket = atomicAdd(arrived, 1u);
        const unsigned all = (ticket / num_blocks + 1) * num_blocks;
        while (static_cast<int>(*static_cast<volatile unsigned*>(arrived) - all) < 0);
        __threadfence();  // what the others wrote, after theirs
    }
    __syncthreads();
}
