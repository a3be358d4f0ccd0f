// Code that all kernels use. The loader puts this text in front of every kernel file.
//
// Python defines these macros (qm_cupy/cuda/compile.py):
//
//   -D real_t=...   storage type:       __half, __nv_bfloat16, float or double
//   -D acc_t=...    computation type:   float, or double if real_t is double
//   -D TF32=...     1 if the tensor cores may multiply floats as TF32, else 0
//   -D TILE=...     and the other constants that Python and CUDA use: sizes, thresholds
//                   and enumerations (qm_cupy/cuda/constants.py)
//
// Every kernel takes the same types of arguments. Integers and flags are `long long`,
// and real-valued options are `double`. `mask` is `bool` (B, N), true for a token; a
// null mask means that every position is a token. `labels` are `int` (B, N), -1 for
// padding. `counts` are `int` (B,), K of each sequence; null counts mean `num_groups`
// groups in every sequence. Grids have one dimension.
//
// Shapes use these letters: B sequences, N tokens of a sequence with padding, D
// elements of a token, K groups or selected tokens of a sequence, L layers, H heads of
// a layer, d elements of a head's query or key. A position is the index of a token in
// its sequence, 0 .. N-1; padding is counted.
// A kernel must stay within its arrays for any labels and counts: labels on a GPU are
// not checked, and a count may exceed the number of tokens. So a kernel uses a label as
// an index only after `group_of`, and reads a count with `count_of`.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The attention score of a masked position; the scores of a selection use `padding`
// below. It is below every real score, and finite: 0 * (score - m) is 0, not NaN. Its
// negative, 1e30, is used as a distance or cost that is above every real one.
constexpr float MASKED_SCORE = -1e30f;

// A distance below this fraction of its terms may be rounding alone: it counts as 0.
constexpr acc_t NOISE = sizeof(acc_t) == 4 ? acc_t(0x1p-19) : acc_t(0x1p-46);

// Conversions from the storage type to the computation type (`widen`) and back
// (`store`, which rounds to nearest).
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

// Return a * b, rounded. The compiler never contracts this product into a fused
// multiply-add. The gradient (score_gradients.cu) computes every score twice, for m and
// for s - m, and both scores have the same bits.
__device__ __forceinline__ float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ __forceinline__ double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}

__device__ __forceinline__ long long thread_index() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Return whether a number is neither infinite nor NaN.
__device__ __forceinline__ bool is_finite(acc_t x) { return x - x == 0; }

// Return whether a position holds a token; without a mask, every position does.
__device__ __forceinline__ bool is_token(const bool* mask, long long index) {
    return mask == nullptr || mask[index];
}

// Return the group of a token, or -1 if the label is padding or out of range.
__device__ __forceinline__ int group_of(int label, long long num_groups) {
    return 0 <= label && label < num_groups ? label : -1;
}

// Return K of a sequence, clamped to 0 .. num_groups.
__device__ __forceinline__ long long count_of(const int* counts, long long sequence,
                                              long long num_groups) {
    if (counts == nullptr) return num_groups;
    const long long count = counts[sequence];
    return count < 0 ? 0 : min(count, num_groups);
}

// Return the score of padding in a selection: -infinity, below the score of any token.
// -padding(), +infinity, is the distance or cost of a pair that cannot merge.
__device__ __forceinline__ acc_t padding() { return __uint_as_float(0xff800000u); }

// Map a score to an unsigned integer: a larger score gives a larger integer, and -0 and
// 0 give the same integer. Selection compares these integers, because a comparison of
// floats flushes subnormals to 0 (CuPy compiles with -ftz=true) and would lose NumPy's
// order.
//
// The bits of a float x >= 0 already increase with x: setting the sign bit puts them
// above all negative numbers. The bits of x < 0 decrease with x: inverting them all
// restores the order.
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

// The online softmax state: the entropy of softmax(scores) in one pass, in nats.
//
//   m   the largest score so far
//   r = sum e^(s - m)              over all scores except one with s = m
//   t = sum e^(s - m) (s - m)      over the same scores; the "centred" sum, t <= 0
//
// The largest score is left out of both sums, because its terms are known: it would add
// 1 to r and 0 to t. With p_j = e^(s_j - m) / (1 + r) the entropy is
//
//   H = -sum_j p_j log p_j = log1p(r) - t / (1 + r)
//
// Both terms are >= 0, so nothing cancels, however far one score lies above the rest.
struct SoftmaxEntropy {
    acc_t m = MASKED_SCORE, r = 0, t = 0;

    __device__ __forceinline__ void add(acc_t score) {
        if (score > m) {  // the new m; the old state is added to it
            *this = {score, 0, 0, *this};
        } else {
            const acc_t d = score - m;
            const acc_t e = exp(d);
            r += e;
            t += e * d;
        }
    }

    // Add the scores of another state; the larger m of the two is left out of the sums.
    __device__ __forceinline__ void merge(const SoftmaxEntropy& other) {
        *this = other.m > m ? SoftmaxEntropy{other.m, other.r, other.t, *this}
                            : SoftmaxEntropy{m, r, t, other};
    }

    __device__ __forceinline__ acc_t value() const { return log1p(r) - t / (1 + r); }

    SoftmaxEntropy() = default;

    // The state (m, r, t) plus all scores of `lower`, whose largest score is at most m.
    // Every term of `lower` is rescaled from its own m to the new one: with
    // d = lower.m - m, e^(s - m) = e^d e^(s - lower.m) and s - m = (s - lower.m) + d.
    // The 1 stands for the score lower.m, which lower.r and lower.t leave out.
    __device__ __forceinline__ SoftmaxEntropy(acc_t m, acc_t r, acc_t t,
                                              const SoftmaxEntropy& lower)
        : m(m), r(r), t(t) {
        if (lower.m == MASKED_SCORE) return;  // `lower` has no scores
        const acc_t d = lower.m - m;
        const acc_t e = exp(d);
        this->r += e * (1 + lower.r);
        this->t += e * (lower.t + d * (1 + lower.r));
    }
};

// Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), a random function of
// a counter (four 32-bit words) and a key (two words). It has no state, so every thread
// computes its own random number. Returns the first of the four output words for the
// counter (c0, c1, 0, c3) and a 64-bit key.
//
// A round multiplies words 0 and 2 by constants, to products of 64 bits. For the
// product of word 0, the high half, XORed with word 3 and a key word, becomes word 2,
// and the low half becomes word 3. Words 2 and 1 give the new words 0 and 1 in the same
// way. Each round then adds a constant to each key word. The constants are the paper's.
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

// Return Gumbel noise, g = -log(-log u), for one token of one sequence. `sequence` is
// the index of the sequence among all sequences with the same seed. `token` is the
// index of the token among the tokens of its sequence; padding is not counted.
//
// u = (k + 1/2) 2^-23 is uniform; k is the upper 23 bits (NOISE_BITS) of a random word.
// Because of the 1/2, u is never 0 or 1, so both logarithms are finite. The logarithms
// are taken in double and rounded once, so that the CPU and the GPU give the same bits.
__device__ __forceinline__ float gumbel(unsigned long long seed, long long sequence,
                                        long long token) {
    const auto low = static_cast<unsigned>(sequence);
    const auto high = static_cast<unsigned>(sequence >> 32);
    const unsigned k =
        philox4x32(static_cast<unsigned>(token), low, high, seed) >> (32 - NOISE_BITS);
    return static_cast<float>(-log(-log((k + 0.5) * (1.0 / (1 << NOISE_BITS)))));
}

// ---- Rows in vectors of 16 bytes
//
// A thread reads and writes 16 bytes of a row at once if the address permits it. Each
// function takes `left`, the number of elements from `address` to the end of the row:
// elements past the end are read as 0 and never written.
constexpr int WIDTH = VECTOR_BYTES / sizeof(real_t);
struct __align__(VECTOR_BYTES) Vector {
    real_t element[WIDTH];
};

// Return whether 16 aligned bytes of the row start at `address`.
__device__ __forceinline__ bool is_aligned_vector(const void* address, long long left) {
    return left >= WIDTH && reinterpret_cast<unsigned long long>(address) % 16 == 0;
}

// Return the largest power of two, at most 16, that divides a number of bytes. x & -x
// is the lowest bit of x that is 1; the OR with 16 limits the result to 16.
__device__ __forceinline__ int alignment_of(unsigned long long bytes) {
    const int bits = static_cast<int>(bytes) | 16;
    return bits & -bits;
}

// Return the widest access, in bytes and at most 16, that is aligned at `address` and
// of which a whole number ends exactly at the end of the row. All vectors of a row have
// the same result, because they start 16 bytes apart.
__device__ __forceinline__ int alignment_of(const real_t* address, long long left) {
    return alignment_of(reinterpret_cast<unsigned long long>(address) |
                        static_cast<unsigned long long>(left) * sizeof(real_t));
}

// Read 16 bytes in accesses of sizeof(Piece) bytes. `address` must be aligned to a
// piece and `left` must be a whole number of pieces.
template <class Piece>
__device__ __forceinline__ Vector read_pieces(const real_t* address, long long left) {
    constexpr int count = 16 / sizeof(Piece), per_piece = WIDTH / count;
    union {
        Piece piece[count];
        Vector vector;
    };
#pragma unroll
    for (int i = 0; i < count; ++i)
        piece[i] =
            i * per_piece < left ? reinterpret_cast<const Piece*>(address)[i] : Piece{};
    return vector;
}

// Read 16 bytes of 16-bit elements from an address that may be aligned to 2 bytes only.
// If all 8 elements are within the row, read the aligned 4-byte words among them. If
// the first element is not aligned to 4 bytes (`odd`), these are 3 words, and the first
// and the last element are read alone; shifts then combine neighbouring halves. Near
// the end of the row, read single elements.
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

// Read the next WIDTH elements of a row in the widest accesses that are possible.
__device__ __forceinline__ Vector read_vector(const real_t* address, long long left) {
    if (is_aligned_vector(address, left))
        return *reinterpret_cast<const Vector*>(address);
    const int alignment = alignment_of(address, left);
    if (alignment >= 8) return read_pieces<uint2>(address, left);
    if (sizeof(real_t) == 4 || alignment == 4)
        return read_pieces<unsigned>(address, left);
    return read_halfwords(address, left);
}

// Read the next WIDTH elements and convert them to the computation type.
__device__ __forceinline__ void load_vector(acc_t (&x)[WIDTH], const real_t* address,
                                            long long left) {
    const Vector v = read_vector(address, left);
    for (int i = 0; i < WIDTH; ++i) x[i] = widen(v.element[i]);
}

// Write the part of a vector that is within the row, in accesses of sizeof(Piece)
// bytes. The conditions are those of `read_pieces`.
template <class Piece>
__device__ __forceinline__ void write_pieces(real_t* address, const Vector& v,
                                             long long left) {
    constexpr int count = 16 / sizeof(Piece), per_piece = WIDTH / count;
    union {
        Vector vector;
        Piece piece[count];
    };
    vector = v;
#pragma unroll
    for (int i = 0; i < count; ++i)
        if (i * per_piece < left) reinterpret_cast<Piece*>(address)[i] = piece[i];
}

// Convert WIDTH elements to the storage type and write those that are within the row.
__device__ __forceinline__ void store_vector(real_t* address, const acc_t (&x)[WIDTH],
                                             long long left) {
    Vector v;
    for (int i = 0; i < WIDTH; ++i) store(&v.element[i], x[i]);
    if (is_aligned_vector(address, left)) {
        *reinterpret_cast<Vector*>(address) = v;
        return;
    }
    const int alignment = alignment_of(address, left);
    if (alignment >= 8)
        write_pieces<uint2>(address, v, left);
    else if (sizeof(real_t) == 4 || alignment == 4)
        write_pieces<unsigned>(address, v, left);
    else
        for (int i = 0; i < WIDTH && i < left; ++i) address[i] = v.element[i];
}

// The activation of a linear layer: none, ReLU, GELU (y Phi(y) with the distribution
// function Phi of the standard normal distribution) or SiLU. GELU and SiLU are not
// inlined: the unrolled loop of the optimized kernel would contain up to 64 copies.
__device__ __noinline__ acc_t gelu(acc_t y) {
    return y * (1 + erf(y * acc_t(0.7071067811865476))) / 2;
}
__device__ __noinline__ acc_t silu(acc_t y) { return y / (1 + exp(-y)); }
__device__ __forceinline__ acc_t activated(acc_t y, long long activation) {
    if (activation == RELU) return y < 0 ? acc_t(0) : y;
    return activation == GELU ? gelu(y) : activation == SILU ? silu(y) : y;
}

// ---- Sums and maxima over warps and blocks
//
// Every reduction combines its values in a fixed order. Floating-point addition is not
// associative, so another order could give other bits.

struct Add {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return a + b; }
};
struct Least {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return min(a, b); }
};
struct Greatest {
    __device__ acc_t operator()(acc_t a, acc_t b) const { return max(a, b); }
};

// Combine the values of all lanes; every lane gets the same result. All 32 lanes of the
// warp must call the function.
template <class Combine>
__device__ __forceinline__ acc_t warp_reduce(acc_t x, Combine combine) {
    for (int bits = 16; bits > 0; bits /= 2)
        x = combine(x, __shfl_xor_sync(~0u, x, bits));
    return x;
}

// Combine the values of all threads of a block; every thread gets the same result. Each
// warp reduces its values, then every warp reduces the results of all warps. If there
// are fewer warps than lanes, the other lanes read the last result again, and
// `lane + bits < warps` keeps these copies out of the reduction. `scratch` is shared
// memory for 32 values.
template <class Combine>
__device__ __forceinline__ acc_t block_reduce(acc_t x, acc_t* scratch,
                                              Combine combine) {
    x = warp_reduce(x, combine);
    __syncthreads();  // an earlier call may still be reading the scratch
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

// Return the inclusive prefix sum over the lanes: the sum up to this lane.
__device__ __forceinline__ int sum_up_to_lane(int x) {
    const int lane = threadIdx.x % 32;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(~0u, x, delta);
        if (lane >= delta) x += other;
    }
    return x;
}

// Return the sum over the warps before this one; `total` becomes the sum over all
// warps. x must be the same in all lanes. `scratch` is shared memory for 32 sums.
__device__ __forceinline__ int sum_of_warps_before(int x, int* scratch, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();  // an earlier call may still be reading the scratch
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    const int other = lane < warps ? scratch[lane] : 0;
    const int up_to = sum_up_to_lane(other);
    *total = __shfl_sync(~0u, up_to, 31);
    return __shfl_sync(~0u, up_to - other, warp);
}

// Return the exclusive prefix sum over the threads: the sum over the threads before
// this one. `total` becomes the sum over all threads.
__device__ __forceinline__ int block_sum_before(int x, int* scratch, int* total) {
    const int up_to = sum_up_to_lane(x);
    const int warp_total = __shfl_sync(~0u, up_to, 31);
    return sum_of_warps_before(warp_total, scratch, total) + up_to - x;
}

// Return the number of threads before this one whose `flag` is true; `total` becomes
// the number in the whole block.
__device__ __forceinline__ int block_rank(bool flag, int* scratch, int* total) {
    const unsigned votes = __ballot_sync(~0u, flag);
    const int rank = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    return rank + sum_of_warps_before(__popc(votes), scratch, total);
}

// Return the dynamic shared memory, 16-byte aligned. The launch sets its size.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char dynamic_bytes[];
    return dynamic_bytes;
}

// A barrier of `num_blocks` blocks: wait until every one of these blocks has called the
// function as often as this block has. The launch must be cooperative, so that all
// blocks run at the same time; otherwise a block could wait forever. `arrived` counts
// the arrivals and starts at 0. It is never reset: the n-th barrier ends at n *
// num_blocks arrivals.
__device__ __forceinline__ void blocks_barrier(unsigned* arrived, unsigned num_blocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // others see this block's writes before its arrival
        const unsigned ticket = atomicAdd(arrived, 1u);
        const unsigned target = (ticket / num_blocks + 1) * num_blocks;
        // Compare the signed difference, so that the counter may wrap around. This
        // is right if `num_blocks` is a power of two; with another number, a launch
        // must have fewer than 2^32 arrivals.
        while (static_cast<int>(*static_cast<volatile unsigned*>(arrived) - target) <
               0);
        __threadfence();  // this block sees the writes of the blocks that arrived
    }
    __syncthreads();
}
