// The attention that each token receives; see basic/attention_received.cu for the
// formulas and the shapes.
//
// From queries and keys, the N x N scores are computed in tiles (tiles.cuh) and never
// stored. Exponents have base 2, so m is in units of ln 2 (softmax_states.cuh says
// why). Every sum has a fixed order, so that every run gives the same bits.

// One warp, one token: each lane counts every 32nd query.
extern "C" __global__ void query_counts(const bool* mask, long long batch,
                                        long long num_tokens, long long causal,
                                        acc_t* counts) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long j = index % num_tokens, sequence_start = index - j;
    const long long first = causal ? j : 0;
    acc_t count = num_tokens - first;
    if (mask) {
        count = 0;
        for (long long i = first + threadIdx.x % 32; i < num_tokens; i += 32)
            count += mask[sequence_start + i];
        count = warp_reduce(count, Add());
    }
    if (threadIdx.x % 32 == 0) counts[index] = is_token(mask, index) ? count : 0;
}

constexpr int STRIP = 32 * WIDTH;  // columns that a warp reads at a time

// One block sums STRIP columns of one matrix. Each lane reads 16 bytes of a row. Warp w
// sums the rows w, w + 8, ...; then the sums of the warps are added, in their order.
extern "C" __global__ void attention_received(const real_t* attention, const bool* mask,
                                              const acc_t* counts, long long outer,
                                              long long batch, long long heads,
                                              long long num_tokens, long long causal,
                                              acc_t* out) {
    constexpr int warps = BLOCK_THREADS / 32;
    __shared__ acc_t parts[warps][STRIP];
    const long long strips = (num_tokens + STRIP - 1) / STRIP;
    const long long head = blockIdx.x / strips;  // (L, B, H)
    const long long sequence_start = head / heads % batch * num_tokens;
    const long long column0 = blockIdx.x % strips * STRIP;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long column = column0 + lane * WIDTH, left = num_tokens - column;
    const real_t* matrix = attention + head * num_tokens * num_tokens;  // (N, N)

    acc_t sums[WIDTH] = {};
    const auto add = [&](const Vector& v, long long row) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k)
            if (!causal || column + k <= row) sums[k] += widen(v.element[k]);
    };
    // With a causal mask, the rows before the strip do not attend to its columns.
    const long long first = (causal ? column0 : 0) + warp;
    // Aligned rows are the common case. They have a loop of their own, which can be
    // unrolled.
    if (alignment_of(matrix, num_tokens) == 16) {
#pragma unroll 4
        for (long long row = first; row < num_tokens; row += warps)
            if (left > 0 && is_token(mask, sequence_start + row))
                add(read_pieces<uint4>(matrix + row * num_tokens + column, left), row);
    } else {
        for (long long row = first; row < num_tokens; row += warps)
            if (left > 0 && is_token(mask, sequence_start + row))
                add(read_vector(matrix + row * num_tokens + column, left), row);
    }
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) parts[warp][lane * WIDTH + k] = sums[k];
    __syncthreads();
    const long long j = column0 + threadIdx.x;
    if (threadIdx.x >= STRIP || j >= num_tokens) return;
    acc_t sum = 0;
    for (int w = 0; w < warps; ++w) sum += parts[w][threadIdx.x];
    const acc_t count = counts[sequence_start + j];
    out[head * num_tokens + j] = count > 0 ? sum / count : 0;
}

// A HalfTile with one stage less: the four stages of a HalfTile are the 48 KiB of
// shared memory that a kernel may declare, and here the columns need some too.
using SlimTile = Shape<TILE / 2, TILE, 1, 3>;
static_assert(SlimTile::threads == BLOCK_THREADS / 2);

// One block computes Tile::rows sums of one head, of the rows of tiles:
//
//   of_keys = true     the rows are keys j:     sum_i 2^(s_ij - m_i) w_i
//   of_keys = false    the rows are queries i:  sum_j 2^(s_ij - m_i) h_j
//
// The block goes through all tiles of columns that the causal mask leaves. `weights`
// are (m, -, w) of the queries of the head, and `values` are h of its keys. Sums are
// written to `parts` (2, Tile::rows) in shared memory: two warps have the same rows,
// each with half of the columns. If `kept` is true, the tile of rows stays in shared
// memory for all tiles of columns (`multiply_kept`).
template <class Tile, bool kept, bool of_keys>
__device__ __forceinline__ acc_t* sums_of_rows(
    unsigned char* shared, const real_t* row_vectors, const real_t* column_vectors,
    const acc_t* weights, const acc_t* values, const bool* valid, long long row0,
    long long num_tokens, long long head_dim, long long causal, double scale) {
    constexpr int threads = Tile::threads, columns = Tile::columns;
    // Numbers of the columns of a tile: m and w of queries, or h of keys.
    constexpr int per_column = of_keys ? 2 : 1;
    __shared__ acc_t of_columns[per_column * columns];
    const long long first_tile = causal && of_keys ? row0 / columns : 0;
    const long long end =
        causal && !of_keys ? min(row0 + Tile::rows, num_tokens) : num_tokens;
    const int num_tiles = static_cast<int>((end + columns - 1) / columns - first_tile);
    const long long start = first_tile * columns;  // the first column

    acc_t row_m[4], sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long row = row0 + Tile::row(i);
        row_m[i] = !of_keys && row < num_tokens ? weights[row * STATE_VALUES] : 0;
    }
    const acc_t factor = acc_t(scale * LOG2_E);
    Fragment scores[1];
    const auto add = [&](int tile) {
        const long long column0 = start + static_cast<long long>(tile) * columns;
        // All warps have left the last tile, because `multiply_…` has a barrier in
        // between. For padding w and h are 0, and m is not NaN even if the scores are,
        // because `max` returns the other number.
        for (int slot = threadIdx.x; slot < per_column * columns; slot += threads) {
            const long long token = column0 + slot % columns;
            acc_t number = 0;
            if (token < num_tokens)
                number = of_keys ? weights[token * STATE_VALUES + slot / columns * 2]
                                 : values[token];
            of_columns[slot] = number;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j)
                scores[0][i][j] = rounded_product(scores[0][i][j], factor);
        // Mask the pairs in which the key is after the query (the tile reaches the
        // diagonal or lies beyond it), padding, and columns past the last token.
        const bool diagonal =
            causal && column0 < row0 + Tile::rows && row0 < column0 + columns;
        if (diagonal || valid || column0 + columns > num_tokens) {
            const unsigned tokens =
                tokens_among<16>(valid, column0, num_tokens, Tile::column);
            const int offset = static_cast<int>(row0 - column0);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const int past_row = Tile::column(j) - offset - Tile::row(i);
                    const bool allowed =
                        !diagonal || (of_keys ? past_row >= 0 : past_row <= 0);
                    if (!(tokens >> j & allowed)) scores[0][i][j] = MASKED_SCORE;
                }
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int column = Tile::column(j);
            const acc_t value =
                of_columns[(per_column - 1) * columns + column];  // w or h
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const acc_t m = of_keys ? of_columns[column] : row_m[i];
                sums[i] = fma(exp2(scores[0][i][j] - m), value, sums[i]);
            }
        }
    };
    const Rows rows = {row_vectors + row0 * head_dim, num_tokens - row0};
    const Rows others = {column_vectors + start * head_dim, num_tokens - start};
    if constexpr (kept)
        multiply_kept<Tile>(shared, rows, others, num_tiles, head_dim, scores, add);
    else
        multiply_tiles<Tile>(shared, rows, others, num_tiles, head_dim, scores, add);

    // The four lanes with the same lane / 4 have the same rows. `shared` is free after
    // the multiplication.
    auto* parts = reinterpret_cast<acc_t*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
        if (threadIdx.x % 4 == 0)
            parts[Tile::warp_column() / 64 * Tile::rows + Tile::row(i)] = sums[i];
    }
    __syncthreads();
    return parts;
}

// One block computes r of Tile::rows keys of one head.
template <class Tile, bool kept>
__device__ __forceinline__ void received(unsigned char* shared, const real_t* query,
                                         const real_t* key, const acc_t* weights,
                                         const bool* mask, const acc_t* counts,
                                         long long batch, long long heads,
                                         long long num_tokens, long long head_dim,
                                         long long causal, double scale, acc_t* out) {
    // With a causal mask the first keys have the most queries; their blocks start
    // first.
    const long long row_tiles = (num_tokens + Tile::rows - 1) / Tile::rows;
    const long long head = blockIdx.x / row_tiles;  // (L, B, H)
    const long long row0 = blockIdx.x % row_tiles * Tile::rows;
    const long long sequence_start = head / heads % batch * num_tokens;
    const long long head_start = head * num_tokens;
    const acc_t* parts = sums_of_rows<Tile, kept, true>(
        shared, key + head_start * head_dim, query + head_start * head_dim,
        weights + head_start * STATE_VALUES, nullptr,
        mask ? mask + sequence_start : nullptr, row0, num_tokens, head_dim, causal,
        scale);
    const long long j = row0 + threadIdx.x;
    if (threadIdx.x >= Tile::rows || j >= num_tokens) return;
    const acc_t sum = parts[threadIdx.x] + parts[Tile::rows + threadIdx.x];
    const acc_t count = counts[sequence_start + j];
    out[head_start + j] = count > 0 ? sum / count : 0;
}

// For keys of small d, whose tile fits in shared memory and is kept there. Keys of
// float64 are not kept.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    query_key_received_kept(const real_t* query, const real_t* key,
                            const acc_t* weights, const bool* mask, const acc_t* counts,
                            long long outer, long long batch, long long heads,
                            long long num_tokens, long long head_dim, long long causal,
                            double scale, acc_t* out) {
    if constexpr (sizeof(acc_t) == 4)
        received<WholeTile, true>(dynamic_shared(), query, key, weights, mask, counts,
                                  batch, heads, num_tokens, head_dim, causal, scale,
                                  out);
}

extern "C" __global__ void __launch_bounds__(SlimTile::threads, TILE_BLOCKS_PER_SM + 1)
    query_key_received(const real_t* query, const real_t* key, const acc_t* weights,
                       const bool* mask, const acc_t* counts, long long outer,
                       long long batch, long long heads, long long num_tokens,
                       long long head_dim, long long causal, double scale, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[SlimTile::bytes];
    received<SlimTile, false>(stages, query, key, weights, mask, counts, batch, heads,
                              num_tokens, head_dim, causal, scale, out);
}

// One block computes o of SlimTile::rows queries of one head.
extern "C" __global__ void __launch_bounds__(SlimTile::threads, TILE_BLOCKS_PER_SM + 1)
    attention_means(const acc_t* values, const real_t* query, const real_t* key,
                    const bool* mask, long long outer, long long batch, long long heads,
                    long long num_tokens, long long head_dim, long long causal,
                    double scale, acc_t* weights) {
    __shared__ __align__(16) unsigned char stages[SlimTile::bytes];
    const long long row_tiles = (num_tokens + SlimTile::rows - 1) / SlimTile::rows;
    const long long head = blockIdx.x / row_tiles;  // (L, B, H)
    // With a causal mask the last rows have the most keys, so their blocks start first.
    const long long row0 = (row_tiles - 1 - blockIdx.x % row_tiles) * SlimTile::rows;
    const long long sequence_start = head / heads % batch * num_tokens;
    const long long head_start = head * num_tokens;
    acc_t* head_weights = weights + head_start * STATE_VALUES;
    const acc_t* parts = sums_of_rows<SlimTile, false, false>(
        stages, query + head_start * head_dim, key + head_start * head_dim,
        head_weights, values + head_start, mask ? mask + sequence_start : nullptr, row0,
        num_tokens, head_dim, causal, scale);
    const long long i = row0 + threadIdx.x;
    if (threadIdx.x >= SlimTile::rows || i >= num_tokens) return;
    const acc_t sum = parts[threadIdx.x] + parts[SlimTile::rows + threadIdx.x];
    acc_t* row = head_weights + i * STATE_VALUES;
    row[1] = sum * row[2];
}
