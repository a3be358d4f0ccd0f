// Nearest anchors by tiles of similarities; basic/nearest.cu has the definition and the
// shapes.
//
// A block multiplies a tile of tokens by all tiles of anchors (`multiply_tiles` of
// tiles.cuh). The block keeps only the best anchor of each token, so the similarities
// (N, K) are never stored.

__device__ __forceinline__ acc_t not_a_number() { return __uint_as_float(0x7fffffffu); }

// The most similar anchor so far; of equal ones the lowest index.
struct Nearest {
    acc_t similarity = padding();  // the value of `rows_nearest`, without |x|
    int anchor = -1;

    // Compare with an anchor whose index is higher than all before: a tie changes
    // nothing.
    __device__ __forceinline__ void update(acc_t other, int index) {
        anchor = other > similarity ? index : anchor;
        similarity = max(similarity, other);  // max of a NaN and a number is the number
    }

    // Compare with an anchor of any index.
    __device__ __forceinline__ void merge(acc_t other, int index) {
        if (other > similarity || (other == similarity && index < anchor)) {
            similarity = other;
            anchor = index;
        }
    }
};

// One block: find the nearest anchors of Tile::rows tokens of one sequence, in a loop
// over all of its anchors. The token's own norm |x| does not change which anchor is
// nearest, so the loop compares values without it:
//   cosine      x . a / |a|            cos = value / |x|
//   EUCLIDEAN   x . a - |a|^2 / 2      -|x - a|^2 = 2 value - |x|^2
// Only `highest_out` needs |x|, from `norms`, at the end.
template <class Tile, bool EUCLIDEAN>
__device__ __forceinline__ void rows_nearest(
    unsigned char* shared, const real_t* tokens, const acc_t* norms, const bool* mask,
    const real_t* anchor_tokens, const acc_t* anchor_norms, const int* counts,
    long long num_tokens, long long dim, long long num_groups, int* out,
    acc_t* highest_out) {
    constexpr int thread_rows = 4 * Tile::fragments;
    const long long row_tiles = (num_tokens + Tile::rows - 1) / Tile::rows;
    const long long b = blockIdx.x / row_tiles;
    const long long row0 = blockIdx.x % row_tiles * Tile::rows;
    const long long first_token = b * num_tokens + row0;  // in (B, N)
    const int num_tiles = static_cast<int>(
        (count_of(counts, b, num_groups) + Tile::columns - 1) / Tile::columns);

    Fragment sums[Tile::fragments];
    Nearest nearest[thread_rows];
    multiply_tiles<Tile>(
        shared, {tokens + first_token * dim, num_tokens - row0},
        {anchor_tokens + b * num_groups * dim, num_groups}, num_tiles, dim, sums,
        [&](int tile) {
            // Read the count again for each tile, because no register is left for it.
            const int left = static_cast<int>(count_of(counts, b, num_groups) -
                                              tile * Tile::columns);
            const acc_t* tile_norms =
                anchor_norms + b * num_groups + tile * Tile::columns;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int column = Tile::column(j);
                const acc_t norm = column < left ? tile_norms[column] : acc_t(-1);
                // A column has similarity NaN, which never wins, if it is past the last
                // anchor or if its anchor is left out (its norm is negative).
                const acc_t term = norm < 0    ? not_a_number()
                                   : EUCLIDEAN ? -norm * norm / 2
                                   : norm == 0 ? acc_t(0)
                                               : 1 / norm;
#pragma unroll
                for (int i = 0; i < thread_rows; ++i) {
                    const acc_t sum = sums[i / 4][i % 4][j];
                    nearest[i].update(EUCLIDEAN   ? sum + term
                                      : term == 0 ? 0
                                                  : sum * term,
                                      tile * Tile::columns + column);
                }
            }
        });

    // Merge over the four lanes of a row, then over the warps that work on the row.
    // `multiply_tiles` has ended with a barrier, so the shared memory is free.
    auto* warp_results = reinterpret_cast<Nearest*>(shared);  // (warps_across, rows)
#pragma unroll
    for (int i = 0; i < thread_rows; ++i) {
        for (int bits = 1; bits < 4; bits *= 2)
            nearest[i].merge(__shfl_xor_sync(~0u, nearest[i].similarity, bits),
                             __shfl_xor_sync(~0u, nearest[i].anchor, bits));
        if (threadIdx.x % 4 == 0)
            warp_results[Tile::warp_column() / 64 * Tile::rows + Tile::row(i)] =
                nearest[i];
    }
    __syncthreads();
    const long long token = first_token + threadIdx.x;
    if (threadIdx.x >= Tile::rows || row0 + threadIdx.x >= num_tokens) return;
    Nearest best = warp_results[threadIdx.x];
    for (int w = 1; w < Tile::warps_across; ++w) {
        const Nearest other = warp_results[w * Tile::rows + threadIdx.x];
        best.merge(other.similarity, other.anchor);
    }
    const bool valid = is_token(mask, token);
    const long long count = valid ? count_of(counts, b, num_groups) : 0;
    if (!valid) best.anchor = -1;
    // If every similarity is NaN, take the first anchor that is not left out. Without
    // such an anchor the result stays -1.
    for (int k = 0; k < count && best.anchor < 0; ++k)
        if (!(anchor_norms[b * num_groups + k] < 0)) best = {MASKED_SCORE, k};
    out[token] = best.anchor;
    if (highest_out == nullptr) return;
    const acc_t norm = norms[token];
    const acc_t similarity = EUCLIDEAN   ? 2 * best.similarity - norm * norm
                             : norm == 0 ? 0
                                         : best.similarity / norm;
    highest_out[token] =
        best.anchor < 0 ? padding() : max(acc_t(MASKED_SCORE), similarity);
}

extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    nearest_anchors(const real_t* tokens, const acc_t* norms, const bool* mask,
                    const real_t* anchor_tokens, const acc_t* anchor_norms,
                    const int* counts, long long batch, long long num_tokens,
                    long long dim, long long num_groups, int* out, acc_t* highest_out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    rows_nearest<WholeTile, false>(stages, tokens, norms, mask, anchor_tokens,
                                   anchor_norms, counts, num_tokens, dim, num_groups,
                                   out, highest_out);
}

// `_half` has tiles of 64 x 128 and `_wide` tiles of 128 x 256 (tiles.cuh); neither
// name is related to the type __half.
extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM)
    nearest_anchors_half(const real_t* tokens, const acc_t* norms, const bool* mask,
                         const real_t* anchor_tokens, const acc_t* anchor_norms,
                         const int* counts, long long batch, long long num_tokens,
                         long long dim, long long num_groups, int* out,
                         acc_t* highest_out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    rows_nearest<HalfTile, false>(stages, tokens, norms, mask, anchor_tokens,
                                  anchor_norms, counts, num_tokens, dim, num_groups,
                                  out, highest_out);
}

extern "C" __global__ void __launch_bounds__(WideTile::threads, 1)
    nearest_anchors_wide(const real_t* tokens, const acc_t* norms, const bool* mask,
                         const real_t* anchor_tokens, const acc_t* anchor_norms,
                         const int* counts, long long batch, long long num_tokens,
                         long long dim, long long num_groups, int* out,
                         acc_t* highest_out) {
    if constexpr (TENSOR_CORES)
        rows_nearest<WideTile, false>(dynamic_shared(), tokens, norms, mask,
                                      anchor_tokens, anchor_norms, counts, num_tokens,
                                      dim, num_groups, out, highest_out);
}

// The same by Euclidean distance.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    euclidean_anchors(const real_t* tokens, const acc_t* norms, const bool* mask,
                      const real_t* anchor_tokens, const acc_t* anchor_norms,
                      const int* counts, long long batch, long long num_tokens,
                      long long dim, long long num_groups, int* out,
                      acc_t* highest_out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    rows_nearest<WholeTile, true>(stages, tokens, norms, mask, anchor_tokens,
                                  anchor_norms, counts, num_tokens, dim, num_groups,
                                  out, highest_out);
}

extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM)
    euclidean_anchors_half(const real_t* tokens, const acc_t* norms, const bool* mask,
                           const real_t* anchor_tokens, const acc_t* anchor_norms,
                           const int* counts, long long batch, long long num_tokens,
                           long long dim, long long num_groups, int* out,
                           acc_t* highest_out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    rows_nearest<HalfTile, true>(stages, tokens, norms, mask, anchor_tokens,
                                 anchor_norms, counts, num_tokens, dim, num_groups, out,
                                 highest_out);
}

extern "C" __global__ void __launch_bounds__(WideTile::threads, 1)
    euclidean_anchors_wide(const real_t* tokens, const acc_t* norms, const bool* mask,
                           const real_t* anchor_tokens, const acc_t* anchor_norms,
                           const int* counts, long long batch, long long num_tokens,
                           long long dim, long long num_groups, int* out,
                           acc_t* highest_out) {
    if constexpr (TENSOR_CORES)
        rows_nearest<WideTile, true>(dynamic_shared(), tokens, norms, mask,
                                     anchor_tokens, anchor_norms, counts, num_tokens,
                                     dim, num_groups, out, highest_out);
}
