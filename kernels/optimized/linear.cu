// Linear maps, computed in tiles (tiles.cuh) or, for few rows, with one warp for each
// output; and norms, with one warp for each row. See basic/linear.cu for the formulas
// and the shapes.

// One block computes one tile of y = activated(x Wᵀ + b) + residual.
//
// With a ReLU, float32 factors are not rounded to TF32, even if TF32 is allowed: FMAs
// compute the products. The sign of a sum decides whether the ReLU passes the sum and
// its gradient. A sum near 0 with the wrong sign would change a gradient entirely.
// Without this rounding, the gradient is that of the float32 network.
template <class Tile>
__device__ __forceinline__ void linear_tile(unsigned char* stages, const real_t* input,
                                            const real_t* weight, const real_t* bias,
                                            const real_t* residual, long long num_rows,
                                            long long in_dim, long long out_dim,
                                            long long activation, real_t* out) {
    const long long column_tiles = (out_dim + Tile::columns - 1) / Tile::columns;
    const long long row0 = blockIdx.x / column_tiles * Tile::rows;
    const long long column0 = blockIdx.x % column_tiles * Tile::columns;
    Fragment sums[1];
    const Rows rows = {input + row0 * in_dim, num_rows - row0};
    const Rows columns = {weight + column0 * in_dim, out_dim - column0};
    // The rows of W are the columns of y. A block has only one tile (the 1), so nothing
    // is done after each tile. `false`: without tensor cores.
    if (TF32 && activation == RELU)
        multiply_tiles<Tile, false>(stages, rows, columns, 1, in_dim, sums, [](int) {});
    else
        multiply_tiles<Tile>(stages, rows, columns, 1, in_dim, sums, [](int) {});
    // Add the bias, if there is one, and apply the activation.
    const int left = static_cast<int>(min(out_dim - column0, (long long)Tile::columns));
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const int column = Tile::column(j);
        const acc_t bias_value =
            bias && column < left ? widen(bias[column0 + column]) : acc_t(0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[0][i][j] = activated(sums[0][i][j] + bias_value, activation);
    }
    // Add the residual and store the rows and columns that exist. `offset` is a column,
    // and `end_offset` is the first column that does not exist. Both are counted from
    // the thread's first column.
    const int end_offset = left - Tile::column(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + Tile::row(i);
        if (row >= num_rows) continue;
        const long long first_element = row * out_dim + column0 + Tile::column(0);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int offset = j / 2 * 8 + j % 2;
            if (offset >= end_offset) continue;
            acc_t y = sums[0][i][j];
            if (residual) y += widen(residual[first_element + offset]);
            store(out + first_element + offset, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    linear(const real_t* input, const real_t* weight, const real_t* bias,
           const real_t* residual, long long num_rows, long long in_dim,
           long long out_dim, long long activation, real_t* out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    linear_tile<WholeTile>(stages, input, weight, bias, residual, num_rows, in_dim,
                           out_dim, activation, out);
}

// The same kernel with tiles of 64 x 128 (`HalfTile` in tiles.cuh), for small inputs;
// it is not related to the type __half.
extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM)
    linear_half(const real_t* input, const real_t* weight, const real_t* bias,
                const real_t* residual, long long num_rows, long long in_dim,
                long long out_dim, long long activation, real_t* out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    linear_tile<HalfTile>(stages, input, weight, bias, residual, num_rows, in_dim,
                          out_dim, activation, out);
}

// `linear` for an input of few rows: one warp computes one output. With few rows,
// almost all of the time is spent on reading the weights.
//
// If `gain` (in,) is not null, x is replaced by norm(x) (basic/linear.cu). If `shift`
// (in,) is null, the norm is the RMS norm: the mean is taken as 0, and the sum of
// shift_k w_k is left out. Only the mean, which is needed if `shift` is not null, takes
// a pass of its own. The factor 1 / sqrt(var + eps) is the same for the whole row, so
// it multiplies the finished sum:
//   norm(x) . w = sum_k (x_k - mean) gain_k w_k / sqrt(var + eps) + sum_k shift_k w_k
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
    if (bias) dot += widen(bias[index % out_dim]);
    const acc_t y = activated(dot, activation);
    store(out + index, residual ? y + widen(residual[index]) : y);
}

// norm(x) of one row, with one warp.
extern "C" __global__ void normalize(const real_t* input, const real_t* gain,
                                     const real_t* shift, long long num_rows,
                                     long long dim, double epsilon, real_t* out) {
    const long long row = thread_index() / 32;
    if (row >= num_rows) return;
    const int lane = threadIdx.x % 32;
    const real_t* x = input + row * dim;

    acc_t mean = 0, squares = 0;
    if (shift) {
        for (long long d = lane; d < dim; d += 32) mean += widen(x[d]);
        mean = warp_reduce(mean, Add()) / dim;
    }
    for (long long d = lane; d < dim; d += 32) {
        const acc_t centred = widen(x[d]) - mean;
        squares += centred * centred;
    }
    squares = warp_reduce(squares, Add());
    const acc_t scale = 1 / sqrt(squares / dim + acc_t(epsilon));
    for (long long d = lane; d < dim; d += 32) {
        const acc_t y = (widen(x[d]) - mean) * scale * widen(gain[d]);
        store(out + row * dim + d, shift ? y + widen(shift[d]) : y);
    }
}
