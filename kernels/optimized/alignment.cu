// AR alignment: prefix means by runs, layers by tiles; see basic/alignment.cu.

// The row that is read t-th. Rows behind the last token keep their places.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// One block, 32 columns of one sequence. Each of its warps sums a run of rows, then
// walks the run again from the sum of all runs before it.
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    __shared__ acc_t sums[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long strips = (dim + 31) / 32;
    const long long b = blockIdx.x / strips, d = blockIdx.x % strips * 32 + lane;
    const long long count = count_of(counts, b, num_groups);
    const long long column = b * num_groups * dim + d;  // of (B, K, D)
    const long long run = (num_groups + warps - 1) / warps;
    const long long first = warp * run, last = min(first + run, num_groups);

    acc_t sum = 0;
    for (long long t = first; t < min(last, count) && d < dim; ++t)
        sum += widen(merged[column + reading(t, count, reversed) * dim]);
    sums[warp][lane] = sum;  // the warp's run, t being the order of reading
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warp; ++w) sum += sums[w][lane];
    for (long long t = first; t < last && d < dim; ++t) {
        const long long row = column + reading(t, count, reversed) * dim;
        if (t < count) sum += widen(merged[row]);
        out[row] = t < count ? sum / acc_t(t + 1) : 0;
    }
}

// One block, one tile of y = x Wᵀ + b, optionally relu(y).
extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    linear(const real_t* input, const real_t* weight, const real_t* bias,
           long long num_rows, long long in_dim, long long out_dim, long long relu,
           real_t* out) {
    __shared__ __align__(16) unsigned char stages[STAGES * STAGE_BYTES];
    const long long strips = (out_dim + TILE - 1) / TILE;
    const long long row0 = blockIdx.x / strips * TILE;
    const long long column0 = blockIdx.x % strips * TILE;
    acc_t sums[4][16];
    multiply_tiles(stages, {input + row0 * in_dim, num_rows - row0},
                   {weight + column0 * in_dim, out_dim - column0}, 1, in_dim, sums,
                   [](int) {});
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const long long column = column0 + tile_column(j);
        if (column >= out_dim) continue;
        const acc_t shift = widen(bias[column]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const long long row = row0 + tile_row(i);
            const acc_t y = sums[i][j] + shift;
            if (row < num_rows)
                store(out + row * out_dim + column, relu && y < 0 ? acc_t(0) : y);
        }
    }
}

// One warp, one prediction.
extern "C" __global__ void prediction_errors(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             long long batch, long long num_groups,
                                             long long dim, long long reversed,
                                             acc_t* out) {
    const long long index = thread_index() / 32;  // (B, K)
    if (index >= batch * num_groups) return;
    const long long b = index / num_groups, t = index % num_groups;
    const long long count = count_of(counts, b, num_groups);

    acc_t squares = 0;
    const long long target = reversed ? t - 1 : t + 1;
    if (t < count && 0 <= target && target < count) {
        const real_t* x = merged + (b * num_groups + target) * dim;  // (D,)
        for (long long d = threadIdx.x % 32; d < dim; d += 32) {
            const acc_t error = prediction[index * dim + d] - widen(x[d]);
            squares += error * error;
        }
    }
    squares = warp_reduce(squares, Add());
    if (threadIdx.x % 32 == 0) out[index] = squares / dim;
}

// One block, one sequence.
extern "C" __global__ void alignment_loss(const acc_t* errors, const int* counts,
                                          long long batch, long long num_groups,
                                          acc_t* out) {
    __shared__ acc_t scratch[32];
    const long long b = blockIdx.x;
    const long long count = count_of(counts, b, num_groups);
    acc_t sum = 0;
    for (long long t = threadIdx.x; t < count; t += blockDim.x)
        sum += errors[b * num_groups + t];
    sum = block_reduce(sum, scratch, Add());
    if (threadIdx.x == 0) out[b] = count > 1 ? sum / acc_t(count - 1) : 0;
}
