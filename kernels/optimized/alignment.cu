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

// One block, one tile of y = activated(x Wᵀ + b) + residual. The sign of a sum decides
// what a ReLU lets through, and its gradient is all or nothing: those sums are float32
// even where TF32 is allowed, so that a gradient is that of the float32 network.
template <class Tile>
__device__ __forceinline__ void linear_tile(unsigned char* stages, const real_t* input,
                                            const real_t* weight, const real_t* bias,
                                            const real_t* residual, long long num_rows,
                                            long long in_dim, long long out_dim,
                                            long long activation, real_t* out) {
    const long long strips = (out_dim + Tile::columns - 1) / Tile::columns;
    const long long row0 = blockIdx.x / strips * Tile::rows;
    const long long column0 = blockIdx.x % strips * Tile::columns;
    Fragment sums[1];
    const Rows rows = {input + row0 * in_dim, num_rows - row0};
    const Rows columns = {weight + column0 * in_dim, out_dim - column0};
    if (TF32 && activation == 1)
        multiply_tiles<Tile, false>(stages, rows, columns, 1, in_dim, sums, [](int) {});
    else
        multiply_tiles<Tile>(stages, rows, columns, 1, in_dim, sums, [](int) {});
    const int left = static_cast<int>(min(out_dim - column0, (long long)Tile::columns));
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const int column = Tile::column(j);
        const acc_t shift = column < left ? widen(bias[column0 + column]) : acc_t(0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[0][i][j] = activated(sums[0][i][j] + shift, activation);
    }
    const int behind = left - Tile::column(0);  // columns, from the thread's first
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + Tile::row(i);
        if (row >= num_rows) continue;
        const long long first = row * out_dim + column0 + Tile::column(0);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int column = j / 2 * 8 + j % 2;
            if (column >= behind) continue;
            acc_t y = sums[0][i][j];
            if (residual) y += widen(residual[first + column]);
            store(out + first + column, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(Whole::threads, TILE_BLOCKS)
    linear(const real_t* input, const real_t* weight, const real_t* bias,
           const real_t* residual, long long num_rows, long long in_dim,
           long long out_dim, long long activation, real_t* out) {
    __shared__ __align__(16) unsigned char stages[Whole::bytes];
    linear_tile<Whole>(stages, input, weight, bias, residual, num_rows, in_dim, out_dim,
                       activation, out);
}

extern "C" __global__ void __launch_bounds__(Half::threads, TILE_BLOCKS)
    linear_half(const real_t* input, const real_t* weight, const real_t* bias,
                const real_t* residual, long long num_rows, long long in_dim,
                long long out_dim, long long activation, real_t* out) {
    __shared__ __align__(16) unsigned char stages[Half::bytes];
    linear_tile<Half>(stages, input, weight, bias, residual, num_rows, in_dim, out_dim,
                      activation, out);
}

// One warp, one output of `linear`: of few rows, where reading the weights is all there
// is to do. With `gain` the row is normalized first, see basic/transformer_prior.cu.
extern "C" __global__ void linear_few(const real_t* input, const real_t* gain,
                                      const real_t* shift, const real_t* weight,
                                      const real_t* bias, const real_t* residual,
                                      long long num_rows, long long in_dim,
                                      long long out_dim, long long activation,
                                      double epsilon, real_t* out) {
    const long long index = thread_index() / 32;  // (rows, out)
    if (index >= num_rows * out_dim) return;
    const int lane = threadIdx.x % 32;
    const real_t* x = input + index / out_dim * in_dim;
    const real_t* w = weight + index % out_dim * in_dim;

    acc_t mean = 0;
    if (shift) {
        for (long long k = lane; k < in_dim; k += 32) mean += widen(x[k]);
        mean = warp_reduce(mean, Add()) / in_dim;
    }
    acc_t dot = 0, squares = 0, sum = 0;
    for (long long k = lane * WIDTH; k < in_dim; k += 32 * WIDTH) {
        acc_t a[WIDTH], v[WIDTH], g[WIDTH], s[WIDTH];
        load_vector(a, x + k, in_dim - k);
        load_vector(v, w + k, in_dim - k);
        if (gain) load_vector(g, gain + k, in_dim - k);
        if (shift) load_vector(s, shift + k, in_dim - k);
        for (int i = 0; i < WIDTH && k + i < in_dim; ++i) {
            const acc_t centred = a[i] - mean;
            squares += centred * centred;
            dot += (gain ? centred * g[i] : centred) * v[i];
            if (shift) sum += s[i] * v[i];
        }
    }
    dot = warp_reduce(dot, Add());
    if (gain) dot *= 1 / sqrt(warp_reduce(squares, Add()) / in_dim + acc_t(epsilon));
    if (shift) dot += warp_reduce(sum, Add());
    if (lane > 0) return;
    const acc_t y = activated(dot + widen(bias[index % out_dim]), activation);
    store(out + index, residual ? y + widen(residual[index]) : y);
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
