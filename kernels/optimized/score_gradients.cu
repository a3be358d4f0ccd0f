// Vector-Jacobian products through the softmax of scores, computed in tiles
// (tiles.cuh); see basic/score_gradients.cu for the formulas, the axes of the arrays,
// row tiles, bands and `sides`. `row_vectors` are the vectors (queries, keys or tokens)
// that belong to the rows of the band; `column_vectors` belong to its columns. Both
// have d elements for each token.
//
//   score_weights       (m, t / (1 + r), g / (1 + r)) of every row; without a gradient
//                       g = 1
//   weight_units        scale the third weight to the range of real_t
//   transpose_tokens    the column vectors as (d, tokens), because
//                       `multiply_tiles` sums along the rows of both factors
//   score_gradients     one tile of a band: 128 columns of a row tile
//   received_gradients  the same for the attention received
//   token_gradients     the band times the transposed column vectors, times `scale`
//                       and the unit of the head
//
// Scores, and m, are in units of ln 2 here (softmax_states.cuh says why). A band of G
// is stored as real_t, so that the tensor cores can multiply it. Every run gives the
// same bits. `State`, `Exponents`, `write_row_states` and `merge_two` are in
// softmax_states.cuh.

// One block computes the weights of 128 rows of one head. The block goes through all
// tiles of keys or, with a causal mask, through the tiles up to its last row. m has
// exactly the bits of the largest score of a row, so that s - m is exactly 0 for that
// score in `score_gradients` too.
// Shapes: gradient (L, B, H, N), query and key (L, B, H, N, d), mask (B, N), weights
// (L, B, H, N, 3).
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    score_weights(const acc_t* gradient, const real_t* query, const real_t* key,
                  const bool* mask, long long outer, long long batch, long long heads,
                  long long num_tokens, long long dim, long long causal, double scale,
                  acc_t* weights) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    const long long tiles_per_head = (num_tokens + TILE - 1) / TILE;
    const long long head = blockIdx.x / tiles_per_head;  // (L, B, H)
    // With a causal mask the last rows have the most keys, so their blocks start first.
    const long long row_tile =
        tiles_per_head - 1 - blockIdx.x % tiles_per_head;  // of the head
    const long long row0 = row_tile * TILE;
    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;

    const int num_key_tiles = static_cast<int>(causal ? row_tile + 1 : tiles_per_head);
    const acc_t factor = acc_t(scale * LOG2_E);
    Fragment scores[1];
    State states[4];
    multiply_tiles<WholeTile>(
        stages, {query + (head * num_tokens + row0) * dim, num_tokens - row0},
        {key + head * num_tokens * dim, num_tokens}, num_key_tiles, dim, scores,
        [&](int tile) {
            const long long column0 = static_cast<long long>(tile) * TILE;
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    scores[0][i][j] = rounded_product(scores[0][i][j], factor);
            // With a causal mask, the tile on the diagonal is the last one.
            const bool diagonal = causal && column0 == row0;
            if (diagonal || valid || column0 + TILE > num_tokens) {
                const unsigned columns =
                    tokens_among<16>(valid, column0, num_tokens, WholeTile::column);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int last_column = diagonal ? WholeTile::row(i) : TILE;
#pragma unroll
                    for (int j = 0; j < 16; ++j) {
                        const bool seen =
                            columns >> j & 1 && WholeTile::column(j) <= last_column;
                        if (!seen) scores[0][i][j] = MASKED_SCORE;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) states[i].add(scores[0][i], Exponents());
        });

    // Write the states to shared memory, which is free after the multiplication. Two
    // warps have the same rows, each with half of the columns, so the states are
    // (2, TILE, 3). Then one thread for each row merges the two states.
    auto* parts = reinterpret_cast<acc_t*>(stages);
    write_row_states(parts + threadIdx.x / 32 % 2 * TILE * STATE_VALUES, states,
                     WholeTile::row);
    __syncthreads();
    const long long row = row0 + threadIdx.x;
    if (threadIdx.x >= TILE || row >= num_tokens) return;
    const State state =
        merge_two(parts + threadIdx.x * STATE_VALUES, TILE * STATE_VALUES);
    acc_t* out = weights + (head * num_tokens + row) * STATE_VALUES;
    out[0] = state.m;                                // in units of ln 2
    out[1] = state.t * acc_t(LN_2) / (1 + state.r);  // in nats
    const acc_t g = gradient ? gradient[head * num_tokens + row] : 1;
    out[2] = is_token(valid, row) ? g / (1 + state.r) : 0;
}

// The third weights of a head, and so G, are stored in a unit of their own:
// max |g / (1 + r)| / LARGEST_WEIGHT, with the maximum over the head. In this unit the
// largest absolute value of a weight is LARGEST_WEIGHT. With d = s - m <= 0 in nats,
// |G| is at most LARGEST_WEIGHT e^d max(|d|, H). Here e^d |d| <= 1/e and H <= log N. So
// |G + Gᵀ| is below 2 (log N + 1) LARGEST_WEIGHT, well below 65504, the largest half.
//
// For the attention received, G = p (h - o), and a weight is 1 / (1 + r). The unit also
// contains max |h|, and h and o are divided by it. Then |h - o| <= 2 and |G| <= 2
// LARGEST_WEIGHT.
constexpr float LARGEST_WEIGHT = 512;

// Return the largest absolute value of x[0], x[stride], ...; all threads get it.
__device__ acc_t largest_of(const acc_t* x, long long count, int stride,
                            acc_t* scratch) {
    acc_t peak = 0;
    for (long long i = threadIdx.x; i < count; i += blockDim.x)
        peak = max(peak, fabs(x[i * stride]));
    return block_reduce(peak, scratch, Greatest());
}

// Compute the unit of a head, and divide the third weight of each row by this unit;
// `token_gradients` multiplies by it. One block, one head.
// Shapes: key_weights (L, B, H, N) or null, weights (L, B, H, N, 3), units (L, B, H).
extern "C" __global__ void weight_units(long long num_tokens, acc_t* key_weights,
                                        acc_t* weights, acc_t* units) {
    __shared__ acc_t scratch[32];
    const long long head = blockIdx.x;  // (L, B, H)
    weights += head * num_tokens * STATE_VALUES;
    const acc_t peak = largest_of(weights + 2, num_tokens, STATE_VALUES, scratch);
    for (long long i = threadIdx.x; i < num_tokens && peak > 0; i += blockDim.x) {
        acc_t& weight = weights[i * STATE_VALUES + 2];
        weight = weight / peak * LARGEST_WEIGHT;
    }
    acc_t unit = peak / LARGEST_WEIGHT;
    if (key_weights) {
        key_weights += head * num_tokens;  // h
        const acc_t key_peak = largest_of(key_weights, num_tokens, 1, scratch);
        for (long long i = threadIdx.x; i < num_tokens && key_peak > 0;
             i += blockDim.x) {
            key_weights[i] /= key_peak;
            weights[i * STATE_VALUES + 1] /= key_peak;  // o
        }
        unit *= key_peak;
    }
    if (threadIdx.x == 0) units[head] = unit;
}

// The weights of a row, as `score_weights` and `weight_units` store them.
struct Weights {
    // `m` is in units of ln 2. `mean` is t / (1 + r), the mean of s - m under the
    // softmax, in nats; for the attention received it is o, the mean of h. `weight` is
    // g / (1 + r), divided by the unit of the head.
    acc_t m, mean, weight;

    explicit __device__ __forceinline__ Weights(const acc_t* values)
        : m(values[0]), mean(values[1]), weight(values[2]) {}

    // Return -g p (log p + H) of one score. With d = s - m in units of ln 2,
    // p = 2^d / (1 + r) and log p + H = d ln 2 - t / (1 + r).
    __device__ __forceinline__ acc_t gradient(acc_t score) const {
        const acc_t d = score - m;
        return weight * exp2(d) * (mean - d * acc_t(LN_2));
    }

    // Return p (h - o) of one score, for the attention received; h is `key_weight`.
    __device__ __forceinline__ acc_t gradient(acc_t score, acc_t key_weight) const {
        return weight * exp2(score - m) * (key_weight - mean);
    }
};
static_assert(sizeof(Weights) == STATE_VALUES * sizeof(acc_t));

// Two neighbouring elements of a row, which a thread writes at once.
struct __align__(2 * sizeof(real_t)) Pair {
    real_t element[2];
};

// One block computes one tile of a band. The score of row i and column j is `scale`
// times the dot product of row_vectors[i] and column_vectors[j]; here it is also
// multiplied by log2 e. A tile that the causal mask empties entirely is not written,
// and `token_gradients` does not read such a tile. `is_received` selects the gradients
// of the attention received; for those of entropies, `key_weights` is not read.
// Shapes: row_vectors and column_vectors (L, B, H, N, d), weights (L, B, H, N, 3),
// key_weights (L, B, H, N), mask (B, N), band (128 band_row_tiles, 128 T).
template <bool is_received>
__device__ __forceinline__ void write_band(
    const real_t* row_vectors, const real_t* column_vectors, const acc_t* weights,
    const acc_t* key_weights, const bool* mask, long long first_row_tile,
    long long batch, long long heads, long long num_tokens, long long dim,
    long long causal, double scale, long long sides, real_t* band) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    const long long tiles_per_head = (num_tokens + TILE - 1) / TILE;  // T
    const long long row_tile = first_row_tile + blockIdx.x / tiles_per_head,
                    head = row_tile / tiles_per_head;
    const long long row0 = row_tile % tiles_per_head * TILE,
                    column0 = blockIdx.x % tiles_per_head * TILE;
    if (causal && (sides == QUERIES ? column0 > row0 : column0 < row0)) return;

    const long long head_start = head * num_tokens;
    Fragment sums[1];
    multiply_tiles<WholeTile>(
        stages, {row_vectors + (head_start + row0) * dim, num_tokens - row0},
        {column_vectors + (head_start + column0) * dim, num_tokens - column0}, 1, dim,
        sums, [](int) {});

    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;
    const unsigned rows = tokens_among<4>(valid, row0, num_tokens, WholeTile::row);
    const unsigned columns =
        tokens_among<16>(valid, column0, num_tokens, WholeTile::column);
    const acc_t factor = acc_t(scale * LOG2_E);
    const bool diagonal = causal && row0 == column0;

    // Load the weights of the rows, then those of the columns: (2, TILE, 3), and
    // (2, TILE) of keys. The stages are free, because `multiply_tiles` has ended with a
    // barrier.
    auto* tile_weights = reinterpret_cast<acc_t*>(stages);
    acc_t* tile_keys = tile_weights + 2 * TILE * STATE_VALUES;
    const int offset = threadIdx.x % TILE;
    const long long token = (threadIdx.x < TILE ? row0 : column0) + offset;
    for (int k = 0; k < STATE_VALUES && token < num_tokens; ++k)
        tile_weights[threadIdx.x * STATE_VALUES + k] =
            weights[(head_start + token) * STATE_VALUES + k];
    if (is_received && token < num_tokens)
        tile_keys[threadIdx.x] = key_weights[head_start + token];
    __syncthreads();
    // `key` is an index of `tile_keys`.
    const auto gradient = [&](const Weights& query_weights, int key, acc_t score) {
        return is_received ? query_weights.gradient(score, tile_keys[key])
                           : query_weights.gradient(score);
    };

    real_t* target =
        band + blockIdx.x / tiles_per_head * TILE * tiles_per_head * TILE + column0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = WholeTile::row(i);
        const Weights row_weights(tile_weights + row * STATE_VALUES);
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            Pair pair;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int column = WholeTile::column(j + k);
                acc_t sum = 0;
                if (rows >> i & columns >> (j + k) & 1) {
                    const acc_t s = rounded_product(sums[0][i][j + k], factor);
                    // In G the row is the query and the column the key; in Gᵀ the
                    // column is the query. So the second term, (Gᵀ)_ij = G_ji, uses the
                    // weights and the causal condition of the column.
                    if (sides & QUERIES && !(diagonal && column > row))
                        sum += gradient(row_weights, TILE + column, s);
                    if (sides & KEYS && !(diagonal && row > column))
                        sum += gradient(
                            Weights(tile_weights + (TILE + column) * STATE_VALUES), row,
                            s);
                }
                store(&pair.element[k], sum);
            }
            *reinterpret_cast<Pair*>(target + row * tiles_per_head * TILE +
                                     WholeTile::column(j)) = pair;
        }
    }
}

// A band of the gradients of entropies. `key_weights` is null.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    score_gradients(const real_t* row_vectors, const real_t* column_vectors,
                    const acc_t* weights, const acc_t* key_weights, const bool* mask,
                    long long first_row_tile, long long band_row_tiles, long long batch,
                    long long heads, long long num_tokens, long long dim,
                    long long causal, double scale, long long sides, real_t* band) {
    write_band<false>(row_vectors, column_vectors, weights, key_weights, mask,
                      first_row_tile, batch, heads, num_tokens, dim, causal, scale,
                      sides, band);
}

// A band of the gradients of the attention received.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    received_gradients(const real_t* row_vectors, const real_t* column_vectors,
                       const acc_t* weights, const acc_t* key_weights, const bool* mask,
                       long long first_row_tile, long long band_row_tiles,
                       long long batch, long long heads, long long num_tokens,
                       long long dim, long long causal, double scale, long long sides,
                       real_t* band) {
    write_band<true>(row_vectors, column_vectors, weights, key_weights, mask,
                     first_row_tile, batch, heads, num_tokens, dim, causal, scale,
                     sides, band);
}

// Transpose the column vectors `tokens` (L, B, H, N, d) to `out` (L, B, H, d, 128 T).
// Padding (mask (B, N)) and the columns past the last token become 0. One block
// transposes SQUARE x SQUARE elements, one row per warp at a time. Each row of the
// square in shared memory has one element more than it needs; otherwise the elements of
// a column would lie in only one or two banks.
extern "C" __global__ void transpose_tokens(const real_t* tokens, const bool* mask,
                                            long long outer, long long batch,
                                            long long heads, long long num_tokens,
                                            long long dim, real_t* out) {
    __shared__ real_t square[SQUARE][SQUARE + 1];
    const long long columns = (num_tokens + TILE - 1) / TILE * TILE;
    const long long squares_down = (dim + SQUARE - 1) / SQUARE,
                    squares_per_head = columns / SQUARE * squares_down;
    const long long head = blockIdx.x / squares_per_head;
    const long long token0 = blockIdx.x % squares_per_head / squares_down * SQUARE;
    const long long d0 = blockIdx.x % squares_down * SQUARE;
    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    for (int i = warp; i < SQUARE; i += warps) {
        const long long token = token0 + i, d = d0 + lane;
        if (token < num_tokens && d < dim && is_token(valid, token))
            square[i][lane] = tokens[(head * num_tokens + token) * dim + d];
        else
            store(&square[i][lane], acc_t(0));
    }
    __syncthreads();
    for (int i = warp; i < SQUARE; i += warps)
        if (d0 + i < dim)
            out[(head * dim + d0 + i) * columns + token0 + lane] = square[lane][i];
}

// One block computes one tile of the gradients of the row vectors: the 128 rows of a
// row tile, and 128 of the d columns. Past the edge of the causal mask the matrix is 0.
// `score_gradients` does not write tiles that lie entirely there, so they are not read.
// Shapes: band (128 band_row_tiles, 128 T), transposed (L, B, H, d, 128 T), units (L,
// B, H), out (L, B, H, N, d).
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    token_gradients(const real_t* band, const real_t* transposed, const acc_t* units,
                    long long first_row_tile, long long band_row_tiles,
                    long long num_tokens, long long dim, long long causal, double scale,
                    long long sides, real_t* out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    const long long tiles_per_head = (num_tokens + TILE - 1) / TILE,
                    columns = tiles_per_head * TILE;
    const long long column_tiles = (dim + TILE - 1) / TILE;
    const long long row_tile = first_row_tile + blockIdx.x / column_tiles,
                    head = row_tile / tiles_per_head;
    const long long row0 = row_tile % tiles_per_head * TILE,
                    d0 = blockIdx.x % column_tiles * TILE;
    const long long first_column = causal && sides == KEYS ? row0 : 0;
    const long long end_column = causal && sides == QUERIES ? row0 + TILE : columns;

    const real_t* band_rows = band + blockIdx.x / column_tiles * TILE * columns;
    Fragment sums[1];
    multiply_tiles<WholeTile>(
        stages, {band_rows + first_column, TILE},
        {transposed + (head * dim + d0) * columns + first_column, dim - d0}, 1,
        end_column - first_column, columns, sums, [](int) {});

    const acc_t factor = units[head] * acc_t(scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + WholeTile::row(i);
        if (row >= num_tokens) continue;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const long long d = d0 + WholeTile::column(j);
            if (d < dim)
                store(out + (head * num_tokens + row) * dim + d,
                      sums[0][i][j] * factor);
        }
    }
}
