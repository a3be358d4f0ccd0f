// Nearest clusters: code that linkage.cu and single_linkage.cu use. A slot is the index
// of a cluster in linkage.cu (linkage_clusters.cuh), and a token in single_linkage.cu.
//
// All comparisons use one strict order of pairs: the distance first, then a hash of the
// pair. Both rows of a pair compute the same hash. The clusters of the closest pair are
// therefore each other's nearest neighbours, so every round makes progress. A hash has
// no pattern, so among many equal distances many clusters are mutual nearest neighbours
// and merge in one round. With a rule such as "the lower index", all of them would
// choose the same neighbour, and only one pair would merge in a round.

// Return 1 - cos, or 0 if it is below the rounding error of a cosine: equal tokens have
// distance 0.
__device__ __forceinline__ acc_t cosine_distance(acc_t cosine) {
    const acc_t distance = 1 - cosine;
    return distance < NOISE ? acc_t(0) : distance;
}

// Return 1 / |x| of a unit token x, where |x|^2 is its cosine with itself. Cosines from
// tensor cores are not exactly 1 on the diagonal, and neither are the cosines of equal
// tokens; the product with 1 / |x| of both tokens corrects this. A token of norm 0 has
// factor 1.
__device__ __forceinline__ acc_t inverse_norm(acc_t self_cosine) {
    return self_cosine == 0 ? acc_t(1) : 1 / sqrt(self_cosine);
}

// Return the hash of the pair {i, j}, which is also that of {j, i}. The hash mixes the
// bits of both indices by splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195),
// which is one to one: different pairs have different hashes, so no tie is left.
__device__ __forceinline__ unsigned long long pair_hash(int i, int j) {
    unsigned long long x = static_cast<unsigned long long>(min(i, j)) << 32 | max(i, j);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// Return whether pair {i, a} comes before pair {i, b} at equal distance. i, a and b are
// slots. `token` maps a slot to the first token of its cluster; null means that a slot
// is a token. Tokens, unlike slots, are never renumbered, so the order does not depend
// on when columns move. Not inlined: ties are rare, and the loops that call this
// function become shorter.
__device__ __noinline__ bool is_before(const int* token, int i, int a, int b) {
    if (token) i = token[i], a = token[a], b = token[b];
    return pair_hash(i, a) < pair_hash(i, b);
}

// The nearest cluster (by its slot) that a row has seen so far, and its distance to the
// cluster of the row. `e` is E of both clusters (linkage.cu); single_linkage.cu sets it
// to 0. Without such a cluster, the distance is infinite (-padding()).
struct Neighbour {
    acc_t distance, e;
    int slot;
};

__device__ __forceinline__ Neighbour no_neighbour() { return {-padding(), 0, -1}; }

// Return whether `a` is nearer to row i than `b`.
__device__ __forceinline__ bool nearer(const int* token, int i, const Neighbour& a,
                                       const Neighbour& b) {
    if (a.distance != b.distance) return a.distance < b.distance;
    return a.distance < -padding() && is_before(token, i, a.slot, b.slot);
}

// Reduce `best` over the `lanes` that work on row i, and return the nearest cluster to
// all of these lanes. `lanes` is a power of two: 32, or fewer if a warp works on
// several rows.
__device__ __forceinline__ Neighbour warp_nearest(const int* token, int i,
                                                  Neighbour best, int lanes = 32) {
    if (lanes == 1) return best;
    acc_t least = best.distance;
    for (int bits = lanes / 2; bits > 0; bits /= 2)
        least = min(least, __shfl_xor_sync(~0u, least, bits));
    const int first_lane = threadIdx.x % 32 / lanes * lanes;  // first lane of row i
    const unsigned row_lanes = ~0u >> (32 - lanes) << first_lane;
    const unsigned votes = __ballot_sync(~0u, best.distance == least) & row_lanes;
    // Hash pairs only if several lanes have the least distance.
    const bool is_tied = (votes & (votes - 1)) != 0 && least < -padding();
    if (!__any_sync(~0u, is_tied)) {
        const int from = __ffs(votes) - 1;
        return {least, __shfl_sync(~0u, best.e, from),
                __shfl_sync(~0u, best.slot, from)};
    }
#pragma unroll 1
    for (int bits = lanes / 2; bits > 0; bits /= 2) {
        const Neighbour other = {__shfl_xor_sync(~0u, best.distance, bits),
                                 __shfl_xor_sync(~0u, best.e, bits),
                                 __shfl_xor_sync(~0u, best.slot, bits)};
        if (nearer(token, i, other, best)) best = other;
    }
    return best;
}

// One block: write to `active` (N,) the tokens that may merge, in ascending order, and
// return their number. `tokens` receives the number of all tokens, protected ones
// included. `rank_scratch` is shared memory for 32 counts. Not inlined: an inlined copy
// would take registers from the code that follows.
__device__ __noinline__ int list_tokens(const bool* mask, const bool* protect,
                                        long long num_tokens, int* rank_scratch,
                                        int* active, int* tokens) {
    int free = 0;
    *tokens = 0;
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        const bool merges = token && !(protect && protect[i]);
        int count;
        block_rank(token, rank_scratch, &count);
        *tokens += count;
        const int position = free + block_rank(merges, rank_scratch, &count);
        free += count;
        if (merges) active[position] = static_cast<int>(i);
    }
    return free;
}

// One warp: return the rank of merge t among `made` merges by height (N,): the number
// of merges that are lower. Of equal heights the earlier merge comes first.
__device__ __forceinline__ long long merge_rank(const acc_t* height, long long made,
                                                long long t) {
    const acc_t height_t = height[t];
    acc_t num_lower = 0;  // a count, exact up to 2^24
    for (long long u = threadIdx.x % 32; u < made; u += 32)
        num_lower += height[u] < height_t || (height[u] == height_t && u < t);
    return static_cast<long long>(warp_reduce(num_lower, Add()));
}

// Write a row of a dendrogram (N - 1, 4) in SciPy's format: the two nodes, the lower
// one first, the height, and the number of tokens.
__device__ __forceinline__ void store_row(double* out, long long row, long long left,
                                          long long right, double height,
                                          long long size) {
    out[4 * row] = static_cast<double>(min(left, right));
    out[4 * row + 1] = static_cast<double>(max(left, right));
    out[4 * row + 2] = height;
    out[4 * row + 3] = static_cast<double>(size);
}

// Write the row (-1, -1, inf, 0), which means "no merge". Such rows follow the merges
// if a sequence has padding or protected tokens, or stopped early.
__device__ __forceinline__ void store_no_row(double* out, long long row) {
    store_row(out, row, -1, -1, __longlong_as_double(0x7FF0000000000000ll), 0);
}
