// Cosine similarities. The matrix is symmetric, so only tiles on or above the diagonal
// are computed; each is written to both halves, and both have the same bits.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 if either norm is 0

// Two neighbours of a row.
struct __align__(2 * sizeof(acc_t)) Pair {
    acc_t first, second;
};

// One block: compute one tile of one sequence, on or above the diagonal.
template <class Tile>
__device__ __forceinline__ void tile_similarity(unsigned char* shared,
                                                const real_t* tokens,
                                                const acc_t* norms,
                                                long long num_tokens, long long dim,
                                                acc_t* out) {
    const long long sides = (num_tokens + Tile::columns - 1) / Tile::columns;
    const long long tiles = sides * (sides + 1) / 2 * (Tile::columns / Tile::rows);
    const long long first = blockIdx.x / tiles * num_tokens;  // token of (B, N)
    const Corner corner = upper_tile<Tile>(blockIdx.x % tiles, sides);
    if (Tile::rows < Tile::columns && corner.row >= num_tokens) return;

    const real_t* sequence = tokens + first * dim;  // (N, D)
    const int row0 = corner.row, column0 = corner.column;
    Fragment sums[Tile::fragments];
    multiply_tiles<Tile>(shared, {sequence + row0 * dim, num_tokens - row0},
                         {sequence + column0 * dim, num_tokens - column0}, 1, dim, sums,
                         [](int) {});

    // Store 1 / norm of the tile's rows, then of its columns; 0 behind the last token.
    auto* reciprocals = reinterpret_cast<acc_t*>(shared);
    constexpr int tokens_of_tile = Tile::rows + Tile::columns;
#pragma unroll
    for (int i0 = 0; i0 < tokens_of_tile; i0 += Tile::threads) {
        const int i = i0 + threadIdx.x;
        if (tokens_of_tile % Tile::threads != 0 && i >= tokens_of_tile) break;
        const int token = i + (i < Tile::rows ? row0 : column0 - Tile::rows);
        const acc_t norm = token < num_tokens ? norms[first + token] : acc_t(0);
        reciprocals[i] = norm == 0 ? acc_t(0) : 1 / norm;
    }
    __syncthreads();

    constexpr int rows = 4 * Tile::fragments;  // of a thread
    acc_t of_row[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) of_row[i] = reciprocals[Tile::row(i)];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const acc_t of_column = reciprocals[Tile::rows + Tile::column(j)];
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            // A zero norm gives 0, whatever the other token is. Clamp, because rounding
            // may exceed [-1, 1]. A NaN stays one.
            const bool zero = of_row[i] == 0 || of_column == 0;
            const acc_t sum = zero ? acc_t(0) : sums[i / 4][i % 4][j];
            const acc_t similarity = sum * of_row[i] * of_column;
            sums[i / 4][i % 4][j] = greater(lesser(similarity, acc_t(1)), acc_t(-1));
        }
    }

    acc_t* matrix = out + first * num_tokens;             // (N, N)
    acc_t* upper = matrix + row0 * num_tokens + column0;  // the tile
    acc_t* lower = matrix + column0 * num_tokens + row0;  // its transpose
    // Tiles at the diagonal or the edge, and odd rows, store single values.
    const bool pairs = num_tokens % 2 == 0 &&
                       reinterpret_cast<unsigned long long>(out) % sizeof(Pair) == 0;
    if (column0 < row0 + Tile::rows || column0 + Tile::columns > num_tokens || !pairs) {
        const int left = static_cast<int>(num_tokens - column0),
                  diagonal = row0 - column0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int column = Tile::column(j);
            if (column >= left) continue;
#pragma unroll
            for (int i = 0; i < rows; ++i) {
                const int row = Tile::row(i);
                if (column < row + diagonal) continue;
                upper[row * num_tokens + column] = sums[i / 4][i % 4][j];
                lower[column * num_tokens + row] = sums[i / 4][i % 4][j];
            }
        }
        return;
    }
    // All other tiles store pairs of neighbours above the diagonal.
#pragma unroll
    for (int i = 0; i < rows; ++i) {
        const acc_t(&of_i)[16] = sums[i / 4][i % 4];
        acc_t* to = upper + Tile::row(i) * num_tokens + Tile::column(0);
#pragma unroll
        for (int j = 0; j < 16; j += 2)
            *reinterpret_cast<Pair*>(to + j * 4) = {of_i[j], of_i[j + 1]};
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        acc_t* to = lower + Tile::column(j) * num_tokens + Tile::row(0);
#pragma unroll
        for (int i = 0; i < rows; ++i) to[i * 8] = sums[i / 4][i % 4][j];
    }
}

extern "C" __global__ void __launch_bounds__(Whole::threads, TILE_BLOCKS)
    cosine_similarity(const real_t* tokens, const acc_t* norms, long long batch,
                      long long num_tokens, long long dim, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[Whole::bytes];
    tile_similarity<Whole>(stages, tokens, norms, num_tokens, dim, out);
}

extern "C" __global__ void __launch_bounds__(Half::threads, TILE_BLOCKS)
    cosine_similarity_half(const real_t* tokens, const acc_t* norms, long long batch,
                           long long num_tokens, long long dim, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[Half::bytes];
    tile_similarity<Half>(stages, tokens, norms, num_tokens, dim, out);
}

extern "C" __global__ void __launch_bounds__(Wide::threads, 1)
    cosine_similarity_wide(const real_t* tokens, const acc_t* norms, long long batch,
                           long long num_tokens, long long dim, acc_t* out) {
    if constexpr (TENSOR_CORES)
        tile_similarity<Wide>(dynamic_shared(), tokens, norms, num_tokens, dim, out);
}
