// Clustering: cosine similarities by upper tiles, each written to both halves.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 where either norm is 0

// One block, one tile (i <= j) of one sequence.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    cosine_similarity(const real_t* tokens, const acc_t* norms, long long batch,
                      long long num_tokens, long long dim, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[STAGES * STAGE_BYTES];
    const long long num_tiles = (num_tokens + TILE - 1) / TILE;
    const long long tiles = num_tiles * (num_tiles + 1) / 2;
    const long long first = blockIdx.x / tiles * num_tokens;  // token of (B, N)
    long long tile_i, tile_j;
    upper_tile(blockIdx.x % tiles, num_tiles, &tile_i, &tile_j);

    const real_t* sequence = tokens + first * dim;  // (N, D)
    const Rows a = {sequence + tile_i * TILE * dim, num_tokens - tile_i * TILE};
    const Rows b = {sequence + tile_j * TILE * dim, num_tokens - tile_j * TILE};
    acc_t sums[4][16];
    multiply_tiles(stages, a, b, 1, dim, sums, [](int) {});

#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = tile_i * TILE + tile_row(i);
        if (row >= num_tokens) continue;
        const acc_t norm = norms[first + row];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const long long column = tile_j * TILE + tile_column(j);
            if (column >= num_tokens || column < row) continue;
            const acc_t other = norms[first + column];
            const bool zero = norm == 0 || other == 0;
            acc_t similarity = zero ? acc_t(0) : sums[i][j] / norm / other;
            if (similarity > 1) similarity = 1;  // by rounding; a NaN stays
            if (similarity < -1) similarity = -1;
            out[(first + row) * num_tokens + column] = similarity;
            out[(first + column) * num_tokens + row] = similarity;
        }
    }
}

// The most similar anchor seen so far; of equal ones the lowest.
struct Nearest {
    acc_t similarity = padding();
    int anchor = -1;

    __device__ __forceinline__ void merge(acc_t other, int index) {
        if (other > similarity || (other == similarity && index < anchor)) {
            similarity = other;
            anchor = index;
        }
    }
};

// One block, 128 tokens of one sequence; it passes by all of the sequence's anchors. A
// token's own norm changes nothing in what is nearest: `norms` is for `highest_out`.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    nearest_anchors(const real_t* tokens, const acc_t* norms, const bool* mask,
                    const real_t* anchors, const acc_t* anchor_norms, const int* counts,
                    long long batch, long long num_tokens, long long dim,
                    long long num_groups, int* out, acc_t* highest_out) {
    __shared__ __align__(16) unsigned char stages[STAGES * STAGE_BYTES];
    const long long row_tiles = (num_tokens + TILE - 1) / TILE;
    const long long b = blockIdx.x / row_tiles;
    const long long row0 = blockIdx.x % row_tiles * TILE;
    const long long first = b * num_tokens + row0;  // token of (B, N)
    const int num_tiles =
        static_cast<int>((count_of(counts, b, num_groups) + TILE - 1) / TILE);

    acc_t sums[4][16];
    Nearest nearest[4];
    multiply_tiles(stages, {tokens + first * dim, num_tokens - row0},
                   {anchors + b * num_groups * dim, num_groups}, num_tiles, dim, sums,
                   [&](int tile) {
                       // Read again for each tile: registers are full.
                       const long long count = count_of(counts, b, num_groups);
#pragma unroll
                       for (int j = 0; j < 16; ++j) {
                           const int k = tile * TILE + tile_column(j);
                           if (k >= count) continue;
                           const acc_t other = anchor_norms[b * num_groups + k];
                           if (other < 0) continue;
#pragma unroll
                           for (int i = 0; i < 4; ++i)
                               nearest[i].merge(other == 0 ? 0 : sums[i][j] / other, k);
                       }
                   });

    // Merge over the four lanes of a row, then over the two warps that share it.
    auto* parts = reinterpret_cast<Nearest*>(stages);  // (2, TILE)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        for (int bits = 1; bits < 4; bits *= 2)
            nearest[i].merge(__shfl_xor_sync(~0u, nearest[i].similarity, bits),
                             __shfl_xor_sync(~0u, nearest[i].anchor, bits));
        if (threadIdx.x % 4 == 0)
            parts[threadIdx.x / 32 % 2 * TILE + tile_row(i)] = nearest[i];
    }
    __syncthreads();
    const long long token = first + threadIdx.x;
    if (threadIdx.x >= TILE || row0 + threadIdx.x >= num_tokens) return;
    Nearest best = parts[threadIdx.x];
    best.merge(parts[TILE + threadIdx.x].similarity, parts[TILE + threadIdx.x].anchor);
    const bool valid = is_token(mask, token);
    const long long count = valid ? count_of(counts, b, num_groups) : 0;
    if (!valid) best.anchor = -1;
    // Where no similarity is a number, it is the first anchor after all.
    for (int k = 0; k < count && best.anchor < 0; ++k)
        if (!(anchor_norms[b * num_groups + k] < 0)) best = {NEVER, k};
    out[token] = best.anchor;
    if (highest_out == nullptr) return;
    const acc_t norm = norms[token];
    const acc_t similarity = norm == 0 ? 0 : best.similarity / norm;
    highest_out[token] = best.anchor < 0 ? padding() : max(acc_t(NEVER), similarity);
}
