// Gradients of linear maps, computed in tiles (tiles.cuh); see basic/linear_vjp.cu for
// the formulas.
//
// `multiply_tiles` computes A Bᵀ: each sum goes over a row of A and a row of B. If a
// sum goes down the columns of a factor, the factor is transposed first, so that its
// columns become rows. For dW = dyᵀ x there are many rows to sum and few weights: with
// one block for each tile of dW, few blocks would run. So the rows are divided into S
// parts of `part_rows` rows. Each part is summed by its own blocks, and `sum_parts`
// adds the parts in order.

// Transpose x (rows, columns) to `out` (S, columns, part_rows). The columns of part s
// are the rows s * part_rows, s * part_rows + 1, ... of x. If x has too few rows for
// the last part, its remaining columns are zeros. One block transposes SQUARE x SQUARE
// elements. A row of `square` has one element more than it needs; otherwise the
// elements of a column would lie in only one or two banks of shared memory.
extern "C" __global__ void transpose(const real_t* x, long long num_rows,
                                     long long num_columns, long long part_rows,
                                     long long num_parts, real_t* out) {
    __shared__ real_t square[SQUARE][SQUARE + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long squares_across = (num_columns + SQUARE - 1) / SQUARE,
                    squares_down = (part_rows + SQUARE - 1) / SQUARE;
    const long long s = blockIdx.x / squares_across / squares_down;
    const long long row0 =
        blockIdx.x / squares_across % squares_down * SQUARE;  // in the part
    const long long column0 = blockIdx.x % squares_across * SQUARE;
    if (s >= num_parts) return;
    for (int i = warp; i < SQUARE; i += warps) {
        const long long row = s * part_rows + row0 + i, column = column0 + lane;
        if (row < num_rows && column < num_columns)
            square[i][lane] = x[row * num_columns + column];
        else
            store(&square[i][lane], acc_t(0));
    }
    __syncthreads();
    for (int i = warp; i < SQUARE; i += warps) {
        const long long column = column0 + i, row = row0 + lane;
        if (column < num_columns && row < part_rows)
            out[(s * num_columns + column) * part_rows + row] = square[lane][i];
    }
}

// One block computes one tile of out_s = A_s B_sᵀ, for A (S, rows, dim), B
// (S, columns, dim) and `out` (S, rows, columns). If `gate` is not null, it is the
// input x of the layer, which is the output of a ReLU. The result is 0 wherever `gate`
// is not above 0: this is the gradient through the ReLU.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    products(const real_t* a, const real_t* b, const real_t* gate, long long num_rows,
             long long num_columns, long long dim, real_t* out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    const long long tiles_across = (num_columns + TILE - 1) / TILE;
    const long long tiles_down = (num_rows + TILE - 1) / TILE;
    const long long s = blockIdx.x / tiles_across / tiles_down;
    const long long row0 = blockIdx.x / tiles_across % tiles_down * TILE;
    const long long column0 = blockIdx.x % tiles_across * TILE;
    Fragment sums[1];
    multiply_tiles<WholeTile>(
        stages, {a + (s * num_rows + row0) * dim, num_rows - row0},
        {b + (s * num_columns + column0) * dim, num_columns - column0}, 1, dim, sums,
        [](int) {});
    // The number of columns of `out` in this tile from the thread's first column on.
    // The thread does not write columns at or beyond this offset.
    const int end_column =
        static_cast<int>(min(num_columns - column0, (long long)TILE)) -
        WholeTile::column(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + WholeTile::row(i);
        if (row >= num_rows) continue;
        const long long first_element =
            (s * num_rows + row) * num_columns + column0 + WholeTile::column(0);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int column = j / 2 * 8 + j % 2;
            if (column >= end_column) continue;
            const bool is_blocked = gate && !(widen(gate[first_element + column]) > 0);
            store(out + first_element + column, is_blocked ? acc_t(0) : sums[0][i][j]);
        }
    }
}

// The sum of S parts with `size` elements each, in order: `parts` (S, size) becomes
// `out` (size,). One thread, one output.
extern "C" __global__ void sum_parts(const real_t* parts, long long num_parts,
                                     long long size, real_t* out) {
    const long long index = thread_index();  // (size,)
    if (index >= size) return;
    acc_t sum = 0;
    for (long long s = 0; s < num_parts; ++s) sum += widen(parts[s * size + index]);
    store(out + index, sum);
}

// db = sum dy, `out` (out_dim,), from the transposed gradient (S, out_dim, part_rows).
// One warp, one output.
extern "C" __global__ void bias_vjp(const real_t* gradient, long long num_parts,
                                    long long out_dim, long long part_rows,
                                    real_t* out) {
    const long long index = thread_index() / 32;  // (out_dim,)
    if (index >= out_dim) return;
    acc_t sum = 0;
    for (long long s = 0; s < num_parts; ++s)
        for (long long r = threadIdx.x % 32; r < part_rows; r += 32)
            sum += widen(gradient[(s * out_dim + index) * part_rows + r]);
    sum = warp_reduce(sum, Add());
    if (threadIdx.x % 32 == 0) store(out + index, sum);
}
