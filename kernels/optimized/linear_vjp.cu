// Gradients of linear maps, computed in tiles; see basic/linear_vjp.cu for the
// formulas.
//
// `multiply_tiles` sums along the rows of both factors, so a factor that is to be
// summed over its columns is transposed first. For dW = dyᵀ x there are many rows to
// sum and few weights: with one block for each tile of dW, few blocks would run. So the
// rows are divided into S parts, each part is summed by its own blocks, and `sum_parts`
// adds the parts in order.

// Transpose x (rows, columns) to (S, columns, part): part s holds the rows from s *
// part on as columns, with zeros past the last row. One block transposes 32 x 32
// elements.
extern "C" __global__ void transpose(const real_t* x, long long num_rows,
                                     long long num_columns, long long part,
                                     long long num_parts, real_t* out) {
    __shared__ real_t
        tile[SQUARE][SQUARE + 1];  // + 1, or a column would lie in the same banks
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long across = (num_columns + SQUARE - 1) / SQUARE,
                    down = (part + SQUARE - 1) / SQUARE;
    const long long s = blockIdx.x / across / down;
    const long long row0 = blockIdx.x / across % down * SQUARE;  // within the part
    const long long column0 = blockIdx.x % across * SQUARE;
    if (s >= num_parts) return;
    for (int i = warp; i < SQUARE; i += warps) {
        const long long row = s * part + row0 + i, column = column0 + lane;
        if (row < num_rows && column < num_columns)
            tile[i][lane] = x[row * num_columns + column];
        else
            store(&tile[i][lane], acc_t(0));
    }
    __syncthreads();
    for (int i = warp; i < SQUARE; i += warps) {
        const long long column = column0 + i, row = row0 + lane;
        if (column < num_columns && row < part)
            out[(s * num_columns + column) * part + row] = tile[lane][i];
    }
}

// One block computes one tile of A_s B_sᵀ, for A (S, rows, dim) and B (S, columns,
// dim). If `input` is not null, the result is 0 wherever `input` is not above 0: this
// is the gradient through a ReLU, as in `linear_vjp` of basic/linear_vjp.cu.
extern "C" __global__ void __launch_bounds__(Whole::threads, TILE_BLOCKS)
    products(const real_t* a, const real_t* b, const real_t* input, long long num_rows,
             long long num_columns, long long dim, real_t* out) {
    __shared__ __align__(16) unsigned char stages[Whole::bytes];
    const long long across = (num_columns + TILE - 1) / TILE;
    const long long down = (num_rows + TILE - 1) / TILE;
    const long long s = blockIdx.x / across / down;
    const long long row0 = blockIdx.x / across % down * TILE;
    const long long column0 = blockIdx.x % across * TILE;
    Fragment sums[1];
    multiply_tiles<Whole>(
        stages, {a + (s * num_rows + row0) * dim, num_rows - row0},
        {b + (s * num_columns + column0) * dim, num_columns - column0}, 1, dim, sums,
        [](int) {});
    const int behind = static_cast<int>(min(num_columns - column0, (long long)TILE)) -
                       Whole::column(0);  // counted from the thread's first column
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + Whole::row(i);
        if (row >= num_rows) continue;
        const long long first =
            (s * num_rows + row) * num_columns + column0 + Whole::column(0);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int column = j / 2 * 8 + j % 2;
            if (column >= behind) continue;
            const bool stopped = input && !(widen(input[first + column]) > 0);
            store(out + first + column, stopped ? acc_t(0) : sums[0][i][j]);
        }
    }
}

// The sum of S parts with `size` elements each, in order. One thread, one output.
extern "C" __global__ void sum_parts(const real_t* parts, long long num_parts,
                                     long long size, real_t* out) {
    const long long index = thread_index();  // (size,)
    if (index >= size) return;
    acc_t sum = 0;
    for (long long s = 0; s < num_parts; ++s) sum += widen(parts[s * size + index]);
    store(out + index, sum);
}

// db = sum dy, from the transposed gradient (S, out, part). One warp, one output.
extern "C" __global__ void bias_vjp(const real_t* gradient, long long num_parts,
                                    long long out_dim, long long part, real_t* out) {
    const long long index = thread_index() / 32;  // (out,)
    if (index >= out_dim) return;
    acc_t sum = 0;
    for (long long s = 0; s < num_parts; ++s)
        for (long long r = threadIdx.x % 32; r < part; r += 32)
            sum += widen(gradient[(s * out_dim + index) * part + r]);
    sum = warp_reduce(sum, Add());
    if (threadIdx.x % 32 == 0) store(out + index, sum);
}
