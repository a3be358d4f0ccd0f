// Contiguous groups; see basic/contiguous.cu. A step finds the least cost from the
// least of each 32 places, and moves 4 D numbers for two products of D.

// x . y of two rows, the same in all lanes of a warp.
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

// Each token's product with the next one, wherever padding lies. One warp, one token.
extern "C" __global__ void neighbour_products(const real_t* units, const bool* mask,
                                              long long batch, long long num_tokens,
                                              long long dim, acc_t* out) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const int lane = threadIdx.x % 32;
    const long long end = index - index % num_tokens + num_tokens;
    long long next = end;
    for (long long j = index + 1; j < end && next == end; j += 32) {
        const bool token = j + lane < end && is_token(mask, j + lane);
        const unsigned votes = __ballot_sync(~0u, token);
        if (votes) next = j + __ffs(votes) - 1;
    }
    const bool any = is_token(mask, index) && next < end;  // the same for all lanes
    const acc_t product =
        any ? warp_dot(units + index * dim, units + next * dim, dim) : acc_t(0);
    if (lane == 0) out[index] = product;
}

// A sequence without its padding: n groups at the places of their first members.
struct Groups {
    const bool* protect;
    acc_t *cost, *square, *size;  // cost of merging with the next one; size 0 is none
    acc_t* product;               // S_a . S_b with the next one
    acc_t* lowest;                // the least cost of each 32 places
    int *token, *left, *right;    // the place's row, and the neighbours' places
    int count;
};

// The two groups that merge and their neighbours, as rows of the tokens; where there is
// no neighbour, a itself, and -1 where nothing is left to merge.
struct Step {
    int a, b, before, after;
};

__device__ __forceinline__ acc_t ward_cost(const Groups& g, int a, int b) {
    if (g.protect && (g.protect[g.token[a]] || g.protect[g.token[b]]))
        return -padding();
    const acc_t m = g.size[a], n = g.size[b];
    const acc_t gap =
        g.square[a] / (m * m) + g.square[b] / (n * n) - 2 * g.product[a] / (m * n);
    return min(acc_t(-MASKED_SCORE), m * n / (m + n) * gap);
}

// The leftmost of the lanes whose value is the least.
__device__ __forceinline__ int least_lane(acc_t value, acc_t* least) {
    *least = warp_reduce(value, Least());
    return __ffs(__ballot_sync(~0u, value == *least)) - 1;
}

// Find the least cost of 32 places anew; by a warp.
__device__ __forceinline__ void refresh(const Groups& g, int chunk) {
    const int place = chunk * 32 + threadIdx.x % 32;
    const acc_t cost = place < g.count ? g.cost[place] : -padding();
    const acc_t least = warp_reduce(cost, Least());
    if (threadIdx.x % 32 == 0) g.lowest[chunk] = least;
}

// The place of the least cost, the leftmost of equals, or -1; by a warp.
__device__ __forceinline__ int cheapest(const Groups& g) {
    const int lane = threadIdx.x, chunks = (g.count + 31) / 32;
    const int run = (chunks + 31) / 32;  // each lane has as many, in order
    acc_t own = -padding(), least;
    int chunk = 0;
    for (int c = lane * run; c < min(lane * run + run, chunks); ++c)
        if (g.lowest[c] < own) own = g.lowest[c], chunk = c;
    chunk = __shfl_sync(~0u, chunk, least_lane(own, &least));
    if (least == -padding()) return -1;  // all that is left is protected
    const int place = chunk * 32 + lane;
    const acc_t cost = place < g.count ? g.cost[place] : -padding();
    return chunk * 32 + least_lane(cost, &least);
}

// Merge the group at place a with the next one, given the sum's products with what
// comes after and before; by a warp.
__device__ __forceinline__ void merge_places(const Groups& g, int a, acc_t with_after,
                                             acc_t with_before) {
    const int b = g.right[a], after = g.right[b], before = g.left[a];
    __syncwarp();
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

// Pack the tokens of a sequence and set each up as a group; by the block, with shared
// memory for 32 counts.
__device__ __forceinline__ void set_up(Groups& g, const bool* mask,
                                       const acc_t* products, long long num_tokens,
                                       int* scratch, int* out) {
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        int found;
        const int place = g.count + block_rank(token, scratch, &found);
        g.count += found;
        if (token) {
            g.token[place] = static_cast<int>(i);
            g.left[place] = place - 1, g.right[place] = place + 1;
            g.square[place] = g.size[place] = 1;
            g.product[place] = products[i];
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

// S of the two becomes one; their products with the neighbours, of this thread's
// columns.
__device__ __forceinline__ void add_rows(real_t* sums, const Step& s, long long dim,
                                         acc_t* with_after, acc_t* with_before) {
    for (long long d = threadIdx.x * WIDTH; d < dim; d += blockDim.x * WIDTH) {
        const auto columns = [&](int row) { return sums + row * dim + d; };
        acc_t sum[WIDTH], other[WIDTH], after[WIDTH], before[WIDTH];
        load_vector(sum, columns(s.a),
                    dim - d);  // all four at once, ahead of the store
        load_vector(other, columns(s.b), dim - d);
        load_vector(after, columns(s.after), dim - d);
        load_vector(before, columns(s.before), dim - d);
        for (int i = 0; i < WIDTH; ++i) {
            sum[i] += other[i];
            *with_after += sum[i] * after[i];
            *with_before += sum[i] * before[i];
        }
        store_vector(columns(s.a), sum, dim - d);
    }
}

// `sums` (B, N, D) holds unit tokens. One block, one sequence: the first warp keeps the
// groups, all threads the sums, each its own columns. The groups lie in `reals` (B, 5N)
// and `links` (B, 3N), or, if these are null, in shared memory.
extern "C" __global__ void contiguous_groups(real_t* sums, const acc_t* products,
                                             const bool* mask, const bool* protect,
                                             const int* counts, long long batch,
                                             long long num_tokens, long long dim,
                                             long long num_groups, acc_t* reals,
                                             int* links, int* out) {
    __shared__ acc_t with_after[32], with_before[32];
    __shared__ int scratch[32];
    __shared__ Step step;
    const long long row = blockIdx.x * num_tokens;  // of (B, N)
    acc_t* real = reals ? reals + CONTIGUOUS_REALS * row
                        : reinterpret_cast<acc_t*>(dynamic_shared());
    int* link = links ? links + CONTIGUOUS_INTEGERS * row
                      : reinterpret_cast<int*>(real + CONTIGUOUS_REALS * num_tokens);
    Groups g = {protect ? protect + row : nullptr,
                real,
                real + num_tokens,
                real + 2 * num_tokens,
                real + 3 * num_tokens,
                real + 4 * num_tokens,
                link,
                link + num_tokens,
                link + 2 * num_tokens,
                0};
    set_up(g, mask ? mask + row : nullptr, products + row, num_tokens, scratch,
           out + row);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long merges = g.count - count_of(counts, blockIdx.x, num_groups);
    for (long long made = 0; made < merges; ++made) {
        int a = -1;
        if (warp == 0) {
            a = cheapest(g);
            if (lane == 0 && a >= 0) {
                const int b = g.right[a], before = g.left[a], after = g.right[b];
                step = {g.token[a], g.token[b], g.token[before < 0 ? a : before],
                        g.token[after < g.count ? after : a]};
            } else if (lane == 0) {
                step.a = -1;
            }
        }
        __syncthreads();
        const Step s = step;
        if (s.a < 0) break;

        acc_t right = 0, left = 0;
        add_rows(sums + row * dim, s, dim, &right, &left);
        right = warp_reduce(right, Add());
        left = warp_reduce(left, Add());
        if (lane == 0) with_after[warp] = right, with_before[warp] = left;
        __syncthreads();
        if (warp > 0) continue;  // the first warp alone has work left
        const int warps = blockDim.x / 32;
        right = warp_reduce(lane < warps ? with_after[lane] : acc_t(0), Add());
        left = warp_reduce(lane < warps ? with_before[lane] : acc_t(0), Add());
        merge_places(g, a, right, left);
    }

    __syncthreads();
    int before = -1;  // groups before these blockDim.x places, less one
    for (int p0 = 0; p0 < g.count; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const bool begins = p < g.count && g.size[p] > 0;
        int found;
        const int rank = before + block_rank(begins, scratch, &found) + begins;
        before += found;
        if (p < g.count) out[row + g.token[p]] = rank;
    }
}
