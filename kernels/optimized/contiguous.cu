// Contiguous groups; basic/contiguous.cu has the formula. One block merges the groups
// of one sequence, one pair in each step, because each merge changes the costs of the
// pairs beside it. A step finds the least cost from the least cost of each chunk of 32
// positions. Then the step loads four rows of D numbers: the sums of the pair and of
// both neighbours, for the products of the new sum with the sums of the neighbours.

// One warp: return x . y of two rows to all lanes.
__device__ __forceinline__ acc_t warp_dot(const real_t* x, const real_t* y,
                                          long long dim) {
    acc_t sum = 0;
    for (long long d = threadIdx.x % 32 * WIDTH; d < dim; d += 32 * WIDTH) {
        acc_t a[WIDTH], b[WIDTH];
        load_vector(a, x + d, dim - d);
        load_vector(b, y + d, dim - d);
        for (int i = 0; i < WIDTH; ++i) sum += a[i] * b[i];
    }
    return warp_reduce(sum, Add());
}

// Products of each vector x: with the next one, across padding (0 if there is none),
// and with itself. For cosines, |x|^2 counts as 1 also if x = 0. One warp computes
// both. Shapes: vectors (B, N, D), mask, products and squares (B, N).
extern "C" __global__ void neighbour_products(const real_t* vectors, const bool* mask,
                                              long long batch, long long num_tokens,
                                              long long dim, long long euclidean,
                                              acc_t* products, acc_t* squares) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const int lane = threadIdx.x % 32;
    const long long sequence_end = index - index % num_tokens + num_tokens;
    // Find the next token, 32 elements of the mask at a time.
    long long next_token = sequence_end;
    for (long long j = index + 1; j < sequence_end && next_token == sequence_end;
         j += 32) {
        const bool token = j + lane < sequence_end && is_token(mask, j + lane);
        const unsigned votes = __ballot_sync(~0u, token);
        if (votes) next_token = j + __ffs(votes) - 1;
    }
    // All lanes have the same value.
    const bool has_next = is_token(mask, index) && next_token < sequence_end;
    const acc_t product =
        has_next ? warp_dot(vectors + index * dim, vectors + next_token * dim, dim)
                 : acc_t(0);
    const acc_t square =
        euclidean ? warp_dot(vectors + index * dim, vectors + index * dim, dim)
                  : acc_t(1);
    if (lane == 0) products[index] = product, squares[index] = square;
}

// The groups of one sequence, without its padding: n tokens are left. The index of a
// group in each array (n,) is that of its first member among these n tokens. In this
// file, "position" means this index. `cost` is the cost of a merge with the next group,
// `square` is |S|^2, and `product` is the product of S with the S of the next group.
// `token` is the index of the first member in (N,); `left` and `right` are the
// positions of the neighbours. If `size` is 0, there is no such group. `chunk_least`
// has the least cost of each chunk of 32 positions.
struct Groups {
    const bool* protect;
    acc_t *cost, *square, *size;
    acc_t* product;
    acc_t* chunk_least;
    int *token, *left, *right;
    int count;  // n
};

// The rows of the sums (N, D) that belong to the two groups that merge, a and b, and to
// their neighbours. If a neighbour does not exist, its row is that of a. If no pair may
// merge, row_a is -1.
struct MergeStep {
    int row_a, row_b, row_before, row_after;
};

// Ward's cost of merging neighbours a and b:
//   n_a n_b / (n_a + n_b) (|S_a|^2 / n_a^2 + |S_b|^2 / n_b^2 - 2 S_a . S_b / (n_a n_b))
// The cost is infinite (-padding()) if one group is protected. The minimum turns a NaN
// into 1e30 (-MASKED_SCORE), which is above every other finite cost.
__device__ __forceinline__ acc_t ward_cost(const Groups& g, int a, int b) {
    if (g.protect && (g.protect[g.token[a]] || g.protect[g.token[b]]))
        return -padding();
    const acc_t size_a = g.size[a], size_b = g.size[b];
    const acc_t squared_gap = g.square[a] / (size_a * size_a) +
                              g.square[b] / (size_b * size_b) -
                              2 * g.product[a] / (size_a * size_b);
    return min(acc_t(-MASKED_SCORE), size_a * size_b / (size_a + size_b) * squared_gap);
}

// One warp: return the first lane with the least value.
__device__ __forceinline__ int least_lane(acc_t value, acc_t* least) {
    *least = warp_reduce(value, Least());
    return __ffs(__ballot_sync(~0u, value == *least)) - 1;
}

// One warp: compute the least cost of a chunk again.
__device__ __forceinline__ void refresh(const Groups& g, int chunk) {
    const int position = chunk * 32 + threadIdx.x % 32;
    const acc_t cost = position < g.count ? g.cost[position] : -padding();
    const acc_t least = warp_reduce(cost, Least());
    if (threadIdx.x % 32 == 0) g.chunk_least[chunk] = least;
}

// The first warp: return the position of the least cost, or -1 if no pair may merge. Of
// equal costs the leftmost wins: each lane compares `chunks_per_lane` neighbouring
// chunks from left to right, and a later chunk must be strictly cheaper.
__device__ __forceinline__ int cheapest(const Groups& g) {
    const int lane = threadIdx.x, chunks = (g.count + 31) / 32;
    const int chunks_per_lane = (chunks + 31) / 32;
    acc_t lane_least = -padding(), least;
    int chunk = 0;
    for (int c = lane * chunks_per_lane;
         c < min(lane * chunks_per_lane + chunks_per_lane, chunks); ++c)
        if (g.chunk_least[c] < lane_least) lane_least = g.chunk_least[c], chunk = c;
    chunk = __shfl_sync(~0u, chunk, least_lane(lane_least, &least));
    if (least == -padding()) return -1;  // all pairs have a protected token
    const int position = chunk * 32 + lane;
    const acc_t cost = position < g.count ? g.cost[position] : -padding();
    return chunk * 32 + least_lane(cost, &least);
}

// Whether the distance sqrt(2 cost) of the group at position a and the next one is at
// most `max_distance`. basic/contiguous.cu explains the details.
__device__ __forceinline__ bool within_distance(const Groups& g, int a,
                                                double max_distance) {
    constexpr acc_t EPSILON = sizeof(acc_t) == 4 ? acc_t(0x1p-23) : acc_t(0x1p-52);
    const int b = g.right[a];
    const acc_t size_a = g.size[a], size_b = g.size[b], cost = g.cost[a];
    const acc_t squared_gap = cost * (size_a + size_b) / (size_a * size_b);
    const acc_t squares =
        g.square[a] / (size_a * size_a) + g.square[b] / (size_b * size_b);
    if (squared_gap < max(NOISE, (size_a + size_b) * EPSILON) * squares) return true;
    return cost < -MASKED_SCORE ? sqrt(2 * double(max(cost, acc_t(0)))) <= max_distance
                                : max_distance == -padding();
}

// The first warp: merge the group at position a with the next one. `with_after` and
// `with_before` are the products of the new sum with the sums of its neighbours. The
// first `__syncwarp` lets every lane read the neighbours before lane 0 changes them;
// the others make the writes of lane 0 visible to all lanes.
__device__ __forceinline__ void merge_groups(const Groups& g, int a, acc_t with_after,
                                             acc_t with_before) {
    const int b = g.right[a], after = g.right[b], before = g.left[a];
    __syncwarp();
    // |S_a + S_b|^2 = |S_a|^2 + |S_b|^2 + 2 S_a . S_b
    if (threadIdx.x == 0) {
        g.square[a] += g.square[b] + 2 * g.product[a];
        g.size[a] += g.size[b];
        g.size[b] = 0, g.cost[b] = -padding();
        g.right[a] = after;
        g.product[a] = with_after;
        if (after < g.count) g.left[after] = a;
        g.cost[a] = after < g.count ? ward_cost(g, a, after) : -padding();
        if (before >= 0) {
            g.product[before] = with_before;
            g.cost[before] = ward_cost(g, before, a);
        }
    }
    __syncwarp();
    refresh(g, a / 32);
    if (b / 32 != a / 32) refresh(g, b / 32);
    if (before >= 0 && before / 32 != a / 32) refresh(g, before / 32);
    __syncwarp();
}

// The block: collect the tokens of a sequence and make each one a group. `scratch` is
// shared memory for 32 counts.
__device__ __forceinline__ void init_groups(Groups& g, const bool* mask,
                                            const acc_t* products, const acc_t* squares,
                                            long long num_tokens, int* scratch,
                                            int* out) {
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        int count;
        const int position = g.count + block_rank(token, scratch, &count);
        g.count += count;
        if (token) {
            g.token[position] = static_cast<int>(i);
            g.left[position] = position - 1, g.right[position] = position + 1;
            g.size[position] = 1;
            g.square[position] = squares[i];
            g.product[position] = products[i];
        }
        if (i < num_tokens) out[i] = -1;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < g.count; p += blockDim.x)
        g.cost[p] = p + 1 < g.count ? ward_cost(g, p, p + 1) : -padding();
    __syncthreads();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int chunk = warp; chunk < (g.count + 31) / 32; chunk += warps)
        refresh(g, chunk);
    __syncthreads();
}

// Add the sum S_b to S_a in this thread's columns. Add these columns' part of the
// products of the new sum with both neighbours to `with_after` and `with_before`.
__device__ __forceinline__ void add_sums(real_t* sums, const MergeStep& s,
                                         long long dim, acc_t* with_after,
                                         acc_t* with_before) {
    for (long long d = threadIdx.x * WIDTH; d < dim; d += blockDim.x * WIDTH) {
        const auto columns = [&](int row) { return sums + row * dim + d; };
        acc_t sum[WIDTH], other[WIDTH], after[WIDTH], before[WIDTH];
        // All four loads come before the store, so that their latencies overlap.
        load_vector(sum, columns(s.row_a), dim - d);
        load_vector(other, columns(s.row_b), dim - d);
        load_vector(after, columns(s.row_after), dim - d);
        load_vector(before, columns(s.row_before), dim - d);
        for (int i = 0; i < WIDTH; ++i) {
            sum[i] += other[i];
            *with_after += sum[i] * after[i];
            *with_before += sum[i] * before[i];
        }
        store_vector(columns(s.row_a), sum, dim - d);
    }
}

// One block merges one sequence: the first warp updates the groups, and all threads
// update the sums, each in its own columns. `sums` (B, N, D) holds the vectors and is
// overwritten. The groups are in `reals` (B, 5N) and `links` (B, 3N), or, if both
// pointers are null, in shared memory. A negative `max_distance` is ignored.
// Other shapes: products and squares (from `neighbour_products`), mask, protect and out
// (B, N), counts (B,).
extern "C" __global__ void contiguous_groups(real_t* sums, const acc_t* products,
                                             const acc_t* squares, const bool* mask,
                                             const bool* protect, const int* counts,
                                             long long batch, long long num_tokens,
                                             long long dim, long long num_groups,
                                             double max_distance, acc_t* reals,
                                             int* links, int* out) {
    __shared__ acc_t with_after[32], with_before[32];
    __shared__ int scratch[32];
    __shared__ MergeStep step;
    const long long sequence_start = blockIdx.x * num_tokens;  // in (B, N)
    acc_t* real = reals ? reals + CONTIGUOUS_REALS * sequence_start
                        : reinterpret_cast<acc_t*>(dynamic_shared());
    int* link = links ? links + CONTIGUOUS_INTEGERS * sequence_start
                      : reinterpret_cast<int*>(real + CONTIGUOUS_REALS * num_tokens);
    Groups g = {protect ? protect + sequence_start : nullptr,
                real,
                real + num_tokens,
                real + 2 * num_tokens,
                real + 3 * num_tokens,
                real + 4 * num_tokens,
                link,
                link + num_tokens,
                link + 2 * num_tokens,
                0};
    init_groups(g, mask ? mask + sequence_start : nullptr, products + sequence_start,
                squares + sequence_start, num_tokens, scratch, out + sequence_start);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long merges = g.count - count_of(counts, blockIdx.x, num_groups);
    for (long long num_merged = 0; num_merged < merges; ++num_merged) {
        int a = -1;
        if (warp == 0) {
            a = cheapest(g);
            if (a >= 0 && max_distance >= 0 && !within_distance(g, a, max_distance))
                a = -1;
            if (lane == 0 && a >= 0) {
                const int b = g.right[a], before = g.left[a], after = g.right[b];
                step = {g.token[a], g.token[b], g.token[before < 0 ? a : before],
                        g.token[after < g.count ? after : a]};
            } else if (lane == 0) {
                step.row_a = -1;
            }
        }
        __syncthreads();
        const MergeStep s = step;
        if (s.row_a < 0) break;

        acc_t after_product = 0, before_product = 0;
        add_sums(sums + sequence_start * dim, s, dim, &after_product, &before_product);
        after_product = warp_reduce(after_product, Add());
        before_product = warp_reduce(before_product, Add());
        if (lane == 0)
            with_after[warp] = after_product, with_before[warp] = before_product;
        __syncthreads();
        // Only the first warp has work left. The other warps wait at the next barrier,
        // which the first warp reaches after it has read both arrays.
        if (warp > 0) continue;
        const int warps = blockDim.x / 32;
        after_product = warp_reduce(lane < warps ? with_after[lane] : acc_t(0), Add());
        before_product =
            warp_reduce(lane < warps ? with_before[lane] : acc_t(0), Add());
        merge_groups(g, a, after_product, before_product);
    }

    __syncthreads();
    int group_before = -1;  // the last group before position p0
    for (int p0 = 0; p0 < g.count; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const bool starts = p < g.count && g.size[p] > 0;
        int count;
        const int label = group_before + block_rank(starts, scratch, &count) + starts;
        group_before += count;
        if (p < g.count) out[sequence_start + g.token[p]] = label;
    }
}
