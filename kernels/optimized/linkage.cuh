// Nearest clusters: what the two linkage kernels share.
//
// Every comparison is by one strict order of pairs, whoever makes it: a pair's
// distance, then a hash of the pair. So the closest pair of all is the nearest of both
// its sides, and of many equal distances a good part can merge in one round.

// A cosine is exact but for its last bits: equal tokens are at distance 0.
__device__ __forceinline__ acc_t cosine_distance(acc_t cosine) {
    constexpr acc_t NOISE = sizeof(acc_t) == 4 ? acc_t(0x1p-19) : acc_t(0x1p-46);
    const acc_t distance = 1 - cosine;
    return distance < NOISE ? acc_t(0) : distance;
}

// What makes the cosine of a token with itself 1, which cosines by tensor cores are not
// quite, nor then those of equal tokens; 1 for a token of norm 0.
__device__ __forceinline__ acc_t inverse_length(acc_t own_cosine) {
    return own_cosine == 0 ? acc_t(1) : 1 / sqrt(own_cosine);
}

// A number for each pair {i, j}, the mixed bits of both (splitmix64, which is one to
// one, Steele et al. 2014, doi:10.1145/2660193.2660195).
__device__ __forceinline__ unsigned long long pair_number(int i, int j) {
    unsigned long long x = static_cast<unsigned long long>(min(i, j)) << 32 | max(i, j);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// Whether pair {i, a} comes before pair {i, b} of the same distance; `token` (null: the
// slot itself) is the token of a slot. Called, not in line: it is rare, and the loops
// that ask are the shorter for it.
__device__ __noinline__ bool is_before(const int* token, int i, int a, int b) {
    if (token) i = token[i], a = token[a], b = token[b];
    return pair_number(i, a) < pair_number(i, b);
}

// The nearest that a row has found so far. Of none, the distance is infinite.
struct Neighbour {
    acc_t distance, sum;
    int slot;
};

__device__ __forceinline__ Neighbour no_neighbour() { return {-padding(), 0, -1}; }

// Whether `a` is nearer to row i than `b`.
__device__ __forceinline__ bool nearer(const int* token, int i, const Neighbour& a,
                                       const Neighbour& b) {
    if (a.distance != b.distance) return a.distance < b.distance;
    return a.distance < -padding() && is_before(token, i, a.slot, b.slot);
}

// The nearest that any of the `lanes` at row i has found, the same in all of them: the
// whole warp, or parts of a power of two with a row each.
__device__ __forceinline__ Neighbour warp_nearest(const int* token, int i,
                                                  Neighbour best, int lanes = 32) {
    if (lanes == 1) return best;
    acc_t least = best.distance;
    for (int bits = lanes / 2; bits > 0; bits /= 2)
        least = min(least, __shfl_xor_sync(~0u, least, bits));
    const int first = threadIdx.x % 32 / lanes * lanes;  // lane of this row
    const unsigned own = ~0u >> (32 - lanes) << first;
    const unsigned votes = __ballot_sync(~0u, best.distance == least) & own;
    // Pairs are hashed only where several lanes are at the least distance.
    const bool tied = (votes & (votes - 1)) != 0 && least < -padding();
    if (!__any_sync(~0u, tied)) {
        const int from = __ffs(votes) - 1;
        return {least, __shfl_sync(~0u, best.sum, from),
                __shfl_sync(~0u, best.slot, from)};
    }
#pragma unroll 1
    for (int bits = lanes / 2; bits > 0; bits /= 2) {
        const Neighbour other = {__shfl_xor_sync(~0u, best.distance, bits),
                                 __shfl_xor_sync(~0u, best.sum, bits),
                                 __shfl_xor_sync(~0u, best.slot, bits)};
        if (nearer(token, i, other, best)) best = other;
    }
    return best;
}

// One block: list the tokens that may merge, ascending. Returns how many these are;
// `tokens` becomes how many there are with the protected ones. Called, not in line: it
// would take registers from what follows.
__device__ __noinline__ int list_tokens(const bool* mask, const bool* protect,
                                        long long num_tokens, int* ranks, int* active,
                                        int* tokens) {
    int free = 0;
    *tokens = 0;
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        const bool merges = token && !(protect && protect[i]);
        int found;
        block_rank(token, ranks, &found);
        *tokens += found;
        const int place = free + block_rank(merges, ranks, &found);
        free += found;
        if (merges) active[place] = static_cast<int>(i);
    }
    return free;
}

// Where merge t comes among `made` merges by height, and by time among equals; by a
// warp.
__device__ __forceinline__ long long merge_rank(const acc_t* height, long long made,
                                                long long t) {
    const acc_t own = height[t];
    acc_t lower = 0;  // a count, exact up to 2^24
    for (long long other = threadIdx.x % 32; other < made; other += 32)
        lower += height[other] < own || (height[other] == own && other < t);
    return static_cast<long long>(warp_reduce(lower, Add()));
}

// A row of a dendrogram (N - 1, 4) in SciPy's format.
__device__ __forceinline__ void store_row(double* out, long long row, long long left,
                                          long long right, double height,
                                          long long size) {
    out[4 * row] = static_cast<double>(min(left, right));
    out[4 * row + 1] = static_cast<double>(max(left, right));
    out[4 * row + 2] = height;
    out[4 * row + 3] = static_cast<double>(size);
}

// A row of no merge, behind those of a sequence with padding or one that stopped early.
__device__ __forceinline__ void store_no_row(double* out, long long row) {
    store_row(out, row, -1, -1, __longlong_as_double(0x7FF0000000000000ll), 0);
}
