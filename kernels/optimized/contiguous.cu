// Contiguous groups; basic/contiguous.cu has the formula. One block merges the groups
// of one sequence, one pair a step, because each merge changes the costs around it. A
// step finds the least cost from the least of each 32 positions (a chunk), and loads
// four rows of D numbers for the two products with the new neighbours.

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

// The product of each token with the next token, across padding. One warp computes one
// product.
extern "C" __global__ void neighbour_products(const real_t* units, const bool* mask,
                                              long long batch, long long num_tokens,
                                              long long dim, acc_t* out) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const int lane = threadIdx.x % 32;
    const long long stop = index - index % num_tokens + num_tokens;
    // Find the next token, 32 positions at a time.
    long long next = stop;
    for (long long j = index + 1; j < stop && next == stop; j += 32) {
        const bool token = j + lane < stop && is_token(mask, j + lane);
        const unsigned votes = __ballot_sync(~0u, token);
        if (votes) next = j + __ffs(votes) - 1;
    }
    const bool any = is_token(mask, index) && next < stop;  // the same for all lanes
    const acc_t product =
        any ? warp_dot(units + index * dim, units + next * dim, dim) : acc_t(0);
    if (lane == 0) out[index] = product;
}

// A sequence without its padding. A group has the position of its first member among
// the tokens that are left. Arrays (n,), except `lowest`.
struct Groups {
    const bool* protect;
    acc_t *cost, *square, *size;  // cost: of merging with the next; size 0: no group
    acc_t* product;               // S_a . S_b with the next one
    acc_t* lowest;                // the least cost of each chunk of 32 positions
    int *token, *left, *right;    // row of the position; neighbours' positions
    int count;
};

// The two groups that merge and their neighbours, as rows of the tokens. If there is no
// neighbour, its row is that of a. If no pair may merge, a is -1.
struct Step {
    int a, b, before, after;
};

// Ward's cost of merging neighbours a and b:
//   n_a n_b / (n_a + n_b) (|S_a|^2 / n_a^2 + |S_b|^2 / n_b^2 - 2 S_a . S_b / (n_a n_b))
// It is infinite if one is protected. The minimum turns a NaN into a finite cost that
// is higher than any other.
__device__ __forceinline__ acc_t ward_cost(const Groups& g, int a, int b) {
    if (g.protect && (g.protect[g.token[a]] || g.protect[g.token[b]]))
        return -padding();
    const acc_t m = g.size[a], n = g.size[b];
    const acc_t gap =
        g.square[a] / (m * m) + g.square[b] / (n * n) - 2 * g.product[a] / (m * n);
    return min(acc_t(-MASKED_SCORE), m * n / (m + n) * gap);
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
    if (threadIdx.x % 32 == 0) g.lowest[chunk] = least;
}

// The first warp: return the position of the least cost, or -1 if no pair may merge. Of
// equal costs the leftmost wins: lanes take chunks in order, and a later chunk must be
// strictly cheaper.
__device__ __forceinline__ int cheapest(const Groups& g) {
    const int lane = threadIdx.x, chunks = (g.count + 31) / 32;
    const int run = (chunks + 31) / 32;  // chunks of each lane, in order
    acc_t own = -padding(), least;
    int chunk = 0;
    for (int c = lane * run; c < min(lane * run + run, chunks); ++c)
        if (g.lowest[c] < own) own = g.lowest[c], chunk = c;
    chunk = __shfl_sync(~0u, chunk, least_lane(own, &least));
    if (least == -padding()) return -1;  // only pairs with a protected token are left
    const int position = chunk * 32 + lane;
    const acc_t cost = position < g.count ? g.cost[position] : -padding();
    return chunk * 32 + least_lane(cost, &least);
}

// The first warp: merge the group at position a with the next one. `with_after` and
// `with_before` are the products of the new sum with the sums of its neighbours.
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

// The block: pack the tokens of a sequence and make each one a group. `scratch` is
// shared memory for 32 counts.
__device__ __forceinline__ void set_up(Groups& g, const bool* mask,
                                       const acc_t* products, long long num_tokens,
                                       int* scratch, int* out) {
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        int count;
        const int position = g.count + block_rank(token, scratch, &count);
        g.count += count;
        if (token) {
            g.token[position] = static_cast<int>(i);
            g.left[position] = position - 1, g.right[position] = position + 1;
            g.square[position] = g.size[position] = 1;
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

// Add the sum S_b to S_a in this thread's columns, and add these columns' part of the
// products with both neighbours to `with_after` and `with_before`.
__device__ __forceinline__ void add_rows(real_t* sums, const Step& s, long long dim,
                                         acc_t* with_after, acc_t* with_before) {
    for (long long d = threadIdx.x * WIDTH; d < dim; d += blockDim.x * WIDTH) {
        const auto columns = [&](int row) { return sums + row * dim + d; };
        acc_t sum[WIDTH], other[WIDTH], after[WIDTH], before[WIDTH];
        load_vector(sum, columns(s.a),
                    dim - d);  // all four loads before the store
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

// `sums` (B, N, D) holds unit tokens and is overwritten. One block merges one sequence:
// the first warp updates the groups, and all threads update the sums, each in its own
// columns. The groups are in `reals` (B, 5N) and `links` (B, 3N), or, if these are
// null, in shared memory.
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
        if (warp > 0) continue;  // only the first warp has work left
        const int warps = blockDim.x / 32;
        right = warp_reduce(lane < warps ? with_after[lane] : acc_t(0), Add());
        left = warp_reduce(lane < warps ? with_before[lane] : acc_t(0), Add());
        merge_groups(g, a, right, left);
    }

    __syncthreads();
    int before = -1;  // last group before these blockDim.x positions
    for (int p0 = 0; p0 < g.count; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const bool starts = p < g.count && g.size[p] > 0;
        int count;
        const int rank = before + block_rank(starts, scratch, &count) + starts;
        before += count;
        if (p < g.count) out[row + g.token[p]] = rank;
    }
}
