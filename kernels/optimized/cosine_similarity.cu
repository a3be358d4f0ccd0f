// Cosine similarities. The matrix is symmetric, so only tiles on or above the diagonal
// are computed; each is written to both halves, and both have the same bits.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 if either norm is 0
//
// Tiles, fragments and `upper_tile` are in tiles.cuh. basic/cosine_similarity.cu has
// the shapes.

// Two neighbouring elements of a row, which a thread stores at once.
struct __align__(2 * sizeof(acc_t)) Pair {
    acc_t first, second;
};

// One block: compute one tile of one sequence, on or above the diagonal. The matrix is
// divided into squares as wide as a tile, `squares_per_side` along each side.
template <class Tile>
__device__ __forceinline__ void tile_similarity(unsigned char* shared,
                                                const real_t* tokens,
                                                const acc_t* norms,
                                                long long num_tokens, long long dim,
                                                acc_t* out) {
    const long long squares_per_side = (num_tokens + Tile::columns - 1) / Tile::columns;
    const long long tiles =
        squares_per_side * (squares_per_side + 1) / 2 * (Tile::columns / Tile::rows);
    const long long sequence_start = blockIdx.x / tiles * num_tokens;  // in (B, N)
    const Corner corner = upper_tile<Tile>(blockIdx.x % tiles, squares_per_side);
    // A tile of the last square may lie past the last token.
    if (Tile::rows < Tile::columns && corner.row >= num_tokens) return;

    const real_t* sequence = tokens + sequence_start * dim;  // (N, D)
    const int row0 = corner.row, column0 = corner.column;
    Fragment sums[Tile::fragments];
    multiply_tiles<Tile>(shared, {sequence + row0 * dim, num_tokens - row0},
                         {sequence + column0 * dim, num_tokens - column0}, 1, dim, sums,
                         [](int) {});

    // Store 1 / norm of the tile's rows, then of its columns; 0 past the last token.
    // `multiply_tiles` has ended with a barrier, so the stages are free.
    auto* reciprocals = reinterpret_cast<acc_t*>(shared);
    constexpr int tokens_of_tile = Tile::rows + Tile::columns;
#pragma unroll
    for (int i0 = 0; i0 < tokens_of_tile; i0 += Tile::threads) {
        const int i = i0 + threadIdx.x;
        if (tokens_of_tile % Tile::threads != 0 && i >= tokens_of_tile) break;
        const int token = i + (i < Tile::rows ? row0 : column0 - Tile::rows);
        const acc_t norm =
            token < num_tokens ? norms[sequence_start + token] : acc_t(0);
        reciprocals[i] = norm == 0 ? acc_t(0) : 1 / norm;
    }
    __syncthreads();

    constexpr int thread_rows = 4 * Tile::fragments;
    acc_t row_factors[thread_rows];
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) row_factors[i] = reciprocals[Tile::row(i)];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const acc_t column_factor = reciprocals[Tile::rows + Tile::column(j)];
#pragma unroll
        for (int i = 0; i < thread_rows; ++i) {
            // A zero norm gives 0, whatever the other token is. Clamp, because rounding
            // may exceed [-1, 1]. NaN stays NaN: `lesser` and `greater`
            // (softmax_states.cuh) return NaN.
            const bool zero = row_factors[i] == 0 || column_factor == 0;
            const acc_t sum = zero ? acc_t(0) : sums[i / 4][i % 4][j];
            const acc_t similarity = sum * row_factors[i] * column_factor;
            sums[i / 4][i % 4][j] = greater(lesser(similarity, acc_t(1)), acc_t(-1));
        }
    }

    acc_t* matrix = out + sequence_start * num_tokens;    // (N, N)
    acc_t* upper = matrix + row0 * num_tokens + column0;  // the tile
    acc_t* lower = matrix + column0 * num_tokens + row0;  // its transpose
    // Store single values if the tile touches the diagonal or the edge, or if the
    // addresses of pairs are not aligned. The diagonal crosses row `row` of the tile at
    // column row + diagonal.
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
            for (int i = 0; i < thread_rows; ++i) {
                const int row = Tile::row(i);
                if (column < row + diagonal) continue;
                upper[row * num_tokens + column] = sums[i / 4][i % 4][j];
                lower[column * num_tokens + row] = sums[i / 4][i % 4][j];
            }
        }
        return;
    }
    // All other tiles store pairs of neighbours in the rows, and single values in their
    // transpose.
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
        const acc_t(&row_values)[16] = sums[i / 4][i % 4];
        acc_t* target = upper + Tile::row(i) * num_tokens + Tile::column(0);
#pragma unroll
        for (int j = 0; j < 16; j += 2)
            *reinterpret_cast<Pair*>(target + j * 4) = {row_values[j],
                                                        row_values[j + 1]};
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        acc_t* target = lower + Tile::column(j) * num_tokens + Tile::row(0);
#pragma unroll
        for (int i = 0; i < thread_rows; ++i) target[i * 8] = sums[i / 4][i % 4][j];
    }
}

extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    cosine_similarity(const real_t* tokens, const acc_t* norms, long long batch,
                      long long num_tokens, long long dim, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    tile_similarity<WholeTile>(stages, tokens, norms, num_tokens, dim, out);
}

// `_half` has tiles of 64 x 128 and `_wide` tiles of 128 x 256 (tiles.cuh); neither
// name is related to the type __half.
extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM)
    cosine_similarity_half(const real_t* tokens, const acc_t* norms, long long batch,
                           long long num_tokens, long long dim, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    tile_similarity<HalfTile>(stages, tokens, norms, num_tokens, dim, out);
}

extern "C" __global__ void __launch_bounds__(WideTile::threads, 1)
    cosine_similarity_wide(const real_t* tokens, const acc_t* norms, long long batch,
                           long long num_tokens, long long dim, acc_t* out) {
    if constexpr (TENSOR_CORES)
        tile_similarity<WideTile>(dynamic_shared(), tokens, norms, num_tokens, dim,
                                  out);
}
