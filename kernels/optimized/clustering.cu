// Clustering: cosine similarities by upper tiles, each written to both halves.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 where either norm is 0

// Two neighbours of a row.
struct __align__(2 * sizeof(acc_t)) Pair {
    acc_t first, second;
};

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

    // 1 / norm of the tile's rows, then of its columns; 0 for no token.
    auto* reciprocals = reinterpret_cast<acc_t*>(stages);
    const int row0 = static_cast<int>(tile_i * TILE);
    const int column0 = static_cast<int>(tile_j * TILE);
    const int token = (threadIdx.x < TILE ? row0 : column0) + threadIdx.x % TILE;
    const acc_t norm = token < num_tokens ? norms[first + token] : acc_t(0);
    reciprocals[threadIdx.x] = norm == 0 ? acc_t(0) : 1 / norm;
    __syncthreads();

    acc_t of_row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_row[i] = reciprocals[tile_row(i)];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const acc_t of_column = reciprocals[TILE + tile_column(j)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // With a zero norm it is 0, whatever the other token is. Within [-1, 1] but
            // for rounding; a NaN stays one.
            const bool zero = of_row[i] == 0 || of_column == 0;
            const acc_t sum = zero ? acc_t(0) : sums[i][j];
            const acc_t similarity = sum * of_row[i] * of_column;
            sums[i][j] = greater(lesser(similarity, acc_t(1)), acc_t(-1));
        }
    }

    acc_t* upper = out + (first + row0) * num_tokens + column0;  // the tile
    acc_t* lower = out + (first + column0) * num_tokens + row0;  // its transpose
    if (tile_i == tile_j || column0 + TILE > num_tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = tile_row(i);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int column = tile_column(j);
                if (column0 + column >= num_tokens || column0 + column < row0 + row)
                    continue;
                upper[row * num_tokens + column] = sums[i][j];
                lower[column * num_tokens + row] = sums[i][j];
            }
        }
        return;
    }
    const bool pairs = num_tokens % 2 == 0 &&
                       reinterpret_cast<unsigned long long>(out) % sizeof(Pair) == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        acc_t* to = upper + tile_row(i) * num_tokens + tile_column(0);
#pragma unroll
        for (int j = 0; j < 16 && pairs; j += 2)
            *reinterpret_cast<Pair*>(to + j * 4) = {sums[i][j], sums[i][j + 1]};
#pragma unroll
        for (int j = 0; j < 16 && !pairs; ++j) to[j / 2 * 8 + j % 2] = sums[i][j];
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        acc_t* to = lower + tile_column(j) * num_tokens + tile_row(0);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i * 8] = sums[i][j];
    }
}

__device__ __forceinline__ acc_t not_a_number() { return __uint_as_float(0x7fffffffu); }

// The most similar anchor seen so far; of equal ones the lowest.
struct Nearest {
    acc_t similarity = padding();
    int anchor = -1;

    // Take in an anchor behind all that were seen.
    __device__ __forceinline__ void see(acc_t other, int index) {
        anchor = other > similarity ? index : anchor;
        similarity = max(similarity, other);  // of a NaN and a number, the number
    }

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
    multiply_tiles(
        stages, {tokens + first * dim, num_tokens - row0},
        {anchors + b * num_groups * dim, num_groups}, num_tiles, dim, sums,
        [&](int tile) {
            // Read again for each tile: registers are full.
            const int left =
                static_cast<int>(count_of(counts, b, num_groups) - tile * TILE);
            const acc_t* of_tile = anchor_norms + b * num_groups + tile * TILE;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const int column = tile_column(j);
                const acc_t norm = column < left ? of_tile[column] : acc_t(-1);
                // What is no anchor is similar by NaN: to nothing.
                const acc_t factor = norm < 0    ? not_a_number()
                                     : norm == 0 ? acc_t(0)
                                                 : 1 / norm;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    nearest[i].see(factor == 0 ? 0 : sums[i][j] * factor,
                                   tile * TILE + column);
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
