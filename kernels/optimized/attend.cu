// Attention of queries to keys that have a bias; see basic/attend.cu for the formula
// and the shapes.
//
// A row is a query of one of the heads that read a head of keys. One block computes
// ROWS rows of a head over one part of its keys, so that each key and value is read
// once for ROWS rows. If there are few rows, as while a model decodes, the keys are
// divided into several parts ("splits"), so that all multiprocessors work;
// `join_splits` then joins the parts. The floor is one read of the keys and values for
// each ROWS rows.
//
// Each warp takes 32 keys at a time. First each lane computes the scores of one key.
// Then the warp goes through the 32 values, and each lane adds the elements lane,
// lane + 32, ... of each value. Every warp keeps its own online softmax: the largest
// score m, the sum r of e^(s - m), and the sum of e^(s - m) v. Keys are assigned to
// warps by position, and warps and splits are combined in order, so every run gives
// the same bits.

constexpr int ATTEND_WARPS = BLOCK_THREADS / 32, ROWS = 4;

// Write the results of one row of one split: the output and Z, or, with several
// splits, the sum of e^(s - m) v, and (m, r), for `join_splits`.
struct AttendOutputs {
    real_t* out;         // (rows, value_dim)
    acc_t* log_sum_exp;  // (rows,)
    acc_t* sums;         // (splits, rows, value_dim), or null for one split
    acc_t* states;       // (splits, rows, 2)
    long long all_rows, value_dim;

    __device__ __forceinline__ void element(long long split, long long row, long long c,
                                            acc_t sum, acc_t r) const {
        if (sums)
            sums[(split * all_rows + row) * value_dim + c] = sum;
        else
            store(out + row * value_dim + c, r > 0 ? sum / r : acc_t(0));
    }
    __device__ __forceinline__ void state(long long split, long long row, acc_t m,
                                          acc_t r) const {
        if (sums) {
            states[(split * all_rows + row) * 2] = m;
            states[(split * all_rows + row) * 2 + 1] = r;
        } else {
            log_sum_exp[row] = r > 0 ? m + log(r) : padding();
        }
    }
};

// Scratch for several splits: `sums` (splits, L, B, H, group, T, value_dim) and
// `states` (splits, L, B, H, group, T, 2); null for one split.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    attend(const real_t* query, const real_t* keys, const real_t* values,
           const acc_t* bias, const bool* mask, long long outer, long long group,
           long long batch, long long heads, long long num_queries, long long num_keys,
           long long head_dim, long long value_dim, long long causal, double scale,
           long long splits, acc_t* sums, acc_t* states, real_t* out,
           acc_t* log_sum_exp) {
    __shared__ acc_t q[ROWS][MAX_HEAD_DIM];
    __shared__ acc_t warp_sums[ATTEND_WARPS][MAX_HEAD_DIM];
    __shared__ acc_t warp_m[ROWS][ATTEND_WARPS], warp_r[ROWS][ATTEND_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long rows = group * num_queries, row_blocks = (rows + ROWS - 1) / ROWS;
    const long long split = blockIdx.x % splits;
    const long long row0 = blockIdx.x / splits % row_blocks * ROWS;
    const long long head = blockIdx.x / splits / row_blocks;
    const long long mask_start = head / heads % batch * num_keys;
    const AttendOutputs outputs = {out,    log_sum_exp,  sums,
                                   states, outer * rows, value_dim};

    // The keys of this split: whole steps of 32 keys for every warp.
    const long long steps = (num_keys + BLOCK_THREADS - 1) / BLOCK_THREADS;
    const long long first_key = steps * split / splits * BLOCK_THREADS;
    const long long end = min(steps * (split + 1) / splits * BLOCK_THREADS, num_keys);
    for (int k = threadIdx.x; k < ROWS * head_dim; k += blockDim.x) {
        const long long row = row0 + k / head_dim, d = k % head_dim;
        q[k / head_dim][d] =
            row < rows ? widen(query[(head * rows + row) * head_dim + d]) : acc_t(0);
    }
    __syncthreads();  // the queries are complete

    acc_t m[ROWS], r[ROWS] = {}, sum[ROWS][MAX_HEAD_DIM / 32] = {};
    long long last[ROWS];  // the last key that each row attends to
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
        m[a] = MASKED_SCORE;
        last[a] =
            causal ? num_keys - num_queries + (row0 + a) % num_queries : num_keys - 1;
    }
    for (long long j0 = first_key + warp * 32; j0 < end; j0 += ATTEND_WARPS * 32) {
        const long long j = j0 + lane, key = head * num_keys + j;
        const acc_t b = j < end && bias ? bias[key] : acc_t(0);
        const bool seen =
            j < end && !(b < MASKED_SCORE) && is_token(mask, mask_start + j);
        acc_t dot[ROWS] = {};
        if (seen) {
            for (long long d = 0; d < head_dim; d += WIDTH) {
                acc_t k[WIDTH];
                load_vector(k, keys + key * head_dim + d, head_dim - d);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    if (d + i < head_dim)
#pragma unroll
                        for (int a = 0; a < ROWS; ++a) dot[a] += q[a][d + i] * k[i];
            }
        }
        acc_t p[ROWS];
#pragma unroll
        for (int a = 0; a < ROWS; ++a) {
            const bool counts = seen && j <= last[a];
            const acc_t s = counts ? rounded_product(dot[a], acc_t(scale)) + b
                                   : acc_t(MASKED_SCORE);
            // All sums are relative to m. If m grows to new_m, multiply them by
            // e^(m - new_m).
            const acc_t new_m = max(m[a], warp_reduce(s, Greatest()));
            p[a] = counts ? exp(s - new_m) : acc_t(0);
            const acc_t rescale = exp(m[a] - new_m);
            m[a] = new_m;
            r[a] = r[a] * rescale + warp_reduce(p[a], Add());
#pragma unroll
            for (int c = 0; c < MAX_HEAD_DIM / 32; ++c) sum[a][c] *= rescale;
        }
        // Add p_k v_k for each of the 32 keys; the lane of key k has p_k.
        const unsigned present = __ballot_sync(~0u, seen);
        for (int k = 0; k < 32; ++k) {
            if (!(present >> k & 1)) continue;  // its value may be NaN
            acc_t weight[ROWS];
#pragma unroll
            for (int a = 0; a < ROWS; ++a) weight[a] = __shfl_sync(~0u, p[a], k);
            const real_t* value = values + (head * num_keys + j0 + k) * value_dim;
#pragma unroll
            for (int c = 0; c < MAX_HEAD_DIM / 32; ++c) {
                if (c * 32 + lane >= value_dim) continue;
                const acc_t v = widen(value[c * 32 + lane]);
#pragma unroll
                for (int a = 0; a < ROWS; ++a) sum[a][c] += weight[a] * v;
            }
        }
    }

    // Combine the warps, one row after the other, relative to the largest score.
    if (lane == 0)
#pragma unroll
        for (int a = 0; a < ROWS; ++a) warp_m[a][warp] = m[a], warp_r[a][warp] = r[a];
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
#pragma unroll
        for (int c = 0; c < MAX_HEAD_DIM / 32; ++c)
            warp_sums[warp][c * 32 + lane] = sum[a][c];
        __syncthreads();
        acc_t block_m = MASKED_SCORE, block_r = 0;
        for (int w = 0; w < ATTEND_WARPS; ++w) block_m = max(block_m, warp_m[a][w]);
        for (int w = 0; w < ATTEND_WARPS; ++w)
            block_r += warp_r[a][w] * exp(warp_m[a][w] - block_m);
        const long long row = head * rows + row0 + a;
        if (row0 + a < rows) {
            for (int c = threadIdx.x; c < value_dim; c += blockDim.x) {
                acc_t y = 0;
                for (int w = 0; w < ATTEND_WARPS; ++w)
                    y += warp_sums[w][c] * exp(warp_m[a][w] - block_m);
                outputs.element(split, row, c, y, block_r);
            }
            if (threadIdx.x == 0) outputs.state(split, row, block_m, block_r);
        }
        __syncthreads();  // the next row overwrites `warp_sums`
    }
}

// Join the splits of every row, in order. One thread, one output.
// Shapes: sums (splits, rows, value_dim), states (splits, rows, 2), out (rows,
// value_dim), log_sum_exp (rows,).
extern "C" __global__ void join_splits(const acc_t* sums, const acc_t* states,
                                       long long splits, long long rows,
                                       long long value_dim, real_t* out,
                                       acc_t* log_sum_exp) {
    const long long index = thread_index();  // (rows, value_dim)
    if (index >= rows * value_dim) return;
    const long long row = index / value_dim;
    acc_t m = MASKED_SCORE, r = 0, sum = 0;
    for (long long s = 0; s < splits; ++s) m = max(m, states[(s * rows + row) * 2]);
    for (long long s = 0; s < splits; ++s) {
        const acc_t weight = exp(states[(s * rows + row) * 2] - m);
        r += states[(s * rows + row) * 2 + 1] * weight;
        sum += sums[s * rows * value_dim + index] * weight;
    }
    store(out + index, r > 0 ? sum / r : acc_t(0));
    if (index % value_dim == 0) log_sum_exp[row] = r > 0 ? m + log(r) : padding();
}
