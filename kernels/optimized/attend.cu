// Attention of queries to keys that have a bias; see basic/attend.cu for the formula
// and the shapes.
//
// A row is a query of one of the heads that read a head of keys. One block computes
// ATTEND_ROWS rows of a head, so that each key and value is read once for these rows.
// The floor is one read of the keys and values for each ATTEND_ROWS rows, and
// 2 (d + value_dim) operations for each row and key.
//
// The keys are divided into parts of ATTEND_KEYS keys. Each part is computed by itself,
// and the parts are added in order. If there are few rows, as while a model decodes,
// each part gets a block, so that all multiprocessors work, and `join_parts` adds the
// parts; otherwise a block computes all parts. Both ways give the same bits, so bits
// do not depend on the number of sequences or on the GPU.
//
// In a part, each warp takes 32 keys at a time. First each lane computes the scores of
// one key. Then the warp goes through the 32 values, and each lane adds the elements
// lane, lane + 32, ... of each value. Every warp keeps its own online softmax: the
// largest score m, the sum r of e^(s - m), and the sums y of e^(s - m) v. The warps are
// combined in order.

constexpr int ATTEND_WARPS = BLOCK_THREADS / 32, LANE_VALUES = MAX_HEAD_DIM / 32;
constexpr int LOADS = 4;  // values that a lane reads before it uses them
static_assert(MAX_HEAD_DIM <= BLOCK_THREADS, "a thread has one element of the output");
static_assert(ATTEND_KEYS % BLOCK_THREADS == 0, "all warps have as many keys");

// One row of some of the keys, and one element of its output.
struct Attended {
    acc_t m = MASKED_SCORE, r = 0, y = 0;

    // Add the same row of other keys. `rounded_product` keeps the compiler from
    // contracting differently in the two kernels that call this.
    __device__ __forceinline__ void add(const Attended& other) {
        if (!(other.r > 0)) return;  // no keys
        const acc_t top = max(m, other.m);
        const acc_t own = exp(m - top), others = exp(other.m - top);
        r = rounded_product(r, own) + rounded_product(other.r, others);
        y = rounded_product(y, own) + rounded_product(other.y, others);
        m = top;
    }

    // Write the element `c` of a row, and Z.
    __device__ __forceinline__ void write(real_t* out, acc_t* log_sum_exp,
                                          long long row, long long c,
                                          long long value_dim) const {
        if (c < value_dim) store(out + row * value_dim + c, r > 0 ? y / r : acc_t(0));
        if (c == 0) log_sum_exp[row] = r > 0 ? m + log(r) : padding();
    }
};

// The online softmax of a warp: the rows of a block over the keys of this warp. Lane l
// has its own part of r, and elements l, l + 32, ... of y.
struct WarpRows {
    acc_t m[ATTEND_ROWS], r[ATTEND_ROWS], y[ATTEND_ROWS][LANE_VALUES];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int a = 0; a < ATTEND_ROWS; ++a) {
            m[a] = MASKED_SCORE, r[a] = 0;
#pragma unroll
            for (int c = 0; c < LANE_VALUES; ++c) y[a][c] = 0;
        }
    }

    // Add the score of one key to row `a`, or no key; return e^(s - m). All sums are
    // relative to m. If m grows, they are multiplied by e^(old m - m).
    __device__ __forceinline__ acc_t weigh(int a, acc_t score, bool counts) {
        const acc_t s = counts ? score : acc_t(MASKED_SCORE);
        const acc_t top = max(m[a], warp_reduce(s, Greatest()));
        const acc_t rescale = exp(m[a] - top), p = counts ? exp(s - top) : acc_t(0);
        m[a] = top;
        r[a] = r[a] * rescale + p;
#pragma unroll
        for (int c = 0; c < LANE_VALUES; ++c) y[a][c] *= rescale;
        return p;
    }

    // Add p_k v_k for the 32 keys of a step; the lane of key k has p_k. `present` has a
    // bit for each key that exists: the values of the others may be NaN.
    __device__ __forceinline__ void add_values(const acc_t (&p)[ATTEND_ROWS],
                                               unsigned present, const real_t* values,
                                               long long value_dim) {
        const int lane = threadIdx.x % 32;
        for (int k0 = 0; k0 < 32; k0 += LOADS) {
            const unsigned some = present >> k0 & ((1u << LOADS) - 1);
            if (some == 0) continue;
            acc_t weight[LOADS][ATTEND_ROWS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
#pragma unroll
                for (int a = 0; a < ATTEND_ROWS; ++a)
                    weight[i][a] = __shfl_sync(~0u, p[a], k0 + i);
            const real_t* value = values + k0 * value_dim + lane;
#pragma unroll
            for (int c = 0; c < LANE_VALUES; ++c) {
                if (c * 32 >= value_dim) break;
                const bool inside = c * 32 + lane < value_dim;
                acc_t v[LOADS];
#pragma unroll
                for (int i = 0; i < LOADS; ++i)
                    v[i] = inside && some >> i & 1
                               ? widen(value[i * value_dim + c * 32])
                               : acc_t(0);
#pragma unroll
                for (int i = 0; i < LOADS; ++i)
#pragma unroll
                    for (int a = 0; a < ATTEND_ROWS; ++a)
                        y[a][c] += weight[i][a] * v[i];
            }
        }
    }
};

// `parts` is 1 if a block computes all keys. Otherwise it is the number of parts, and
// the results are sums (parts, L, B, H, group, T, value_dim) and states (parts, L, B,
// H, group, T, 2): y, and (m, r).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    attend(const real_t* query, const real_t* keys, const real_t* values,
           const acc_t* bias, const bool* mask, long long outer, long long group,
           long long batch, long long heads, long long num_queries, long long num_keys,
           long long head_dim, long long value_dim, long long causal, double scale,
           long long parts, acc_t* sums, acc_t* states, real_t* out,
           acc_t* log_sum_exp) {
    __shared__ __align__(16) acc_t q[ATTEND_ROWS][MAX_HEAD_DIM];
    __shared__ long long last[ATTEND_ROWS];  // the last key that each row attends to
    __shared__ acc_t warp_y[ATTEND_WARPS][MAX_HEAD_DIM];
    __shared__ acc_t warp_m[ATTEND_ROWS][ATTEND_WARPS];
    __shared__ acc_t warp_r[ATTEND_ROWS][ATTEND_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long rows = group * num_queries;
    const long long row_blocks = (rows + ATTEND_ROWS - 1) / ATTEND_ROWS;
    const long long row0 = blockIdx.x / parts % row_blocks * ATTEND_ROWS;
    const long long head = blockIdx.x / parts / row_blocks;
    const long long mask_start = head / heads % batch * num_keys;

    // Elements past d are 0, so that the products below need no condition.
    for (int k = threadIdx.x; k < ATTEND_ROWS * MAX_HEAD_DIM; k += blockDim.x) {
        const long long row = row0 + k / MAX_HEAD_DIM, d = k % MAX_HEAD_DIM;
        q[k / MAX_HEAD_DIM][d] = row < rows && d < head_dim
                                     ? widen(query[(head * rows + row) * head_dim + d])
                                     : acc_t(0);
    }
    if (threadIdx.x < ATTEND_ROWS) {
        const long long after = num_queries - 1 - (row0 + threadIdx.x) % num_queries;
        last[threadIdx.x] = num_keys - 1 - (causal ? after : 0);
    }
    __syncthreads();    // the queries are complete
    long long end = 0;  // of the keys that some row attends to
    for (int a = 0; a < ATTEND_ROWS; ++a) end = max(end, last[a] + 1);

    Attended totals[ATTEND_ROWS];
    WarpRows state;
    // A part starts at the key `part_key`.
    const long long first_key = blockIdx.x % parts * ATTEND_KEYS;
    const long long stride = parts * ATTEND_KEYS;
    for (long long part_key = first_key; part_key < (sums ? num_keys : end);
         part_key += stride) {
        state.clear();
        const long long part_end = min(part_key + ATTEND_KEYS, end);
        for (long long j0 = part_key + warp * 32; j0 < part_end; j0 += BLOCK_THREADS) {
            const long long j = j0 + lane, key = head * num_keys + j;
            const acc_t b = j < part_end && bias ? bias[key] : acc_t(0);
            const bool seen =
                j < part_end && !(b < MASKED_SCORE) && is_token(mask, mask_start + j);
            const unsigned present = __ballot_sync(~0u, seen);
            if (present == 0) continue;
            acc_t dot[ATTEND_ROWS] = {};
            if (seen) {
                for (long long d = 0; d < head_dim; d += WIDTH) {
                    acc_t k[WIDTH];
                    load_vector(k, keys + key * head_dim + d, head_dim - d);
#pragma unroll
                    for (int a = 0; a < ATTEND_ROWS; ++a)
#pragma unroll
                        for (int i = 0; i < WIDTH; ++i) dot[a] += q[a][d + i] * k[i];
                }
            }
            acc_t p[ATTEND_ROWS];
#pragma unroll
            for (int a = 0; a < ATTEND_ROWS; ++a)
                p[a] = state.weigh(a, rounded_product(dot[a], acc_t(scale)) + b,
                                   seen && j <= last[a]);
            state.add_values(p, present, values + (head * num_keys + j0) * value_dim,
                             value_dim);
        }

        // Combine the warps in order, one row after the other.
#pragma unroll
        for (int a = 0; a < ATTEND_ROWS; ++a) {
            const acc_t warp_total = warp_reduce(state.r[a], Add());
            if (lane == 0) warp_m[a][warp] = state.m[a], warp_r[a][warp] = warp_total;
#pragma unroll
            for (int c = 0; c < LANE_VALUES; ++c)
                warp_y[warp][c * 32 + lane] = state.y[a][c];
            __syncthreads();
            Attended part;
            const int column = threadIdx.x % MAX_HEAD_DIM;
            for (int w = 0; w < ATTEND_WARPS; ++w)
                part.add({warp_m[a][w], warp_r[a][w], warp_y[w][column]});
            totals[a].add(part);
            __syncthreads();  // the next row overwrites `warp_y`
        }
    }

#pragma unroll
    for (int a = 0; a < ATTEND_ROWS; ++a) {
        if (row0 + a >= rows) break;
        const long long row = head * rows + row0 + a, c = threadIdx.x;
        if (!sums) {
            totals[a].write(out, log_sum_exp, row, c, value_dim);
            continue;
        }
        const long long at = blockIdx.x % parts * outer * rows + row;
        if (c < value_dim) sums[at * value_dim + c] = totals[a].y;
        if (c == 0) states[at * 2] = totals[a].m, states[at * 2 + 1] = totals[a].r;
    }
}

// Add the parts of every row, in order. One thread, one output.
// Shapes: sums (parts, rows, value_dim), states (parts, rows, 2), out (rows,
// value_dim), log_sum_exp (rows,).
extern "C" __global__ void join_parts(const acc_t* sums, const acc_t* states,
                                      long long parts, long long rows,
                                      long long value_dim, real_t* out,
                                      acc_t* log_sum_exp) {
    const long long index = thread_index();  // (rows, value_dim)
    if (index >= rows * value_dim) return;
    const long long row = index / value_dim;
    Attended total;
#pragma unroll 4
    for (long long part = 0; part < parts; ++part) {
        const acc_t* state = states + (part * rows + row) * 2;
        total.add({state[0], state[1], sums[part * rows * value_dim + index]});
    }
    total.write(out, log_sum_exp, row, index % value_dim, value_dim);
}
