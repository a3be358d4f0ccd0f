// Vector-Jacobian products of the entropies of softmax scores: from the gradient of the
// entropies to that of queries and keys, or of tokens. See basic/query_key_entropy.cu
// and basic/self_attention_entropy.cu.
//
// The entropy of a softmax has the derivatives
//
//   dH_i / ds_ij = -p_ij (log p_ij + H_i),    log p_ij + H_i = (s_ij - m) - t / (1 + r)
//
// with (m, r, t) of row i as in SoftmaxEntropy (common.cuh), so that nothing cancels if
// one score lies far above the rest. With the gradient g_i of H_i, the gradient of the
// scores is G_ij = g_i dH_i / ds_ij. The N x N matrix G is never stored: scores are
// computed again, and G is computed for one band of rows at a time.
//
//   score_weights     (m, t / (1 + r), g / (1 + r)) of every row
//   score_gradients   a band of G, with queries as rows, or of Gᵀ, with keys as rows
//   token_gradients   the band times the vectors of its columns (keys, queries or
//                     tokens), times `scale`
//
// Arrays have L layers, B sequences, H heads in each layer, N tokens, and d elements in
// a row. `outer` = L B H is the number of all heads.
//
// The N rows of a head are divided into T row tiles of 128 rows. A row tile has all
// columns of the head: 128 T, with N rounded up. A band is a number of whole row tiles.
// Row tiles are numbered across all heads: row tile t belongs to head t / T of (L, B,
// H). `sides` selects the matrix: G for 1 (QUERIES), Gᵀ for 2 (KEYS), and G + Gᵀ for 3
// (both), where queries and keys are the same tokens.
//
// One thread, one output.

constexpr long long TILE_ROWS = TILE;

// Return the score of two rows (d,): a . b scale.
__device__ acc_t score(const real_t* a, const real_t* b, long long dim, double scale) {
    acc_t dot = 0;
    for (long long d = 0; d < dim; ++d) dot += widen(a[d]) * widen(b[d]);
    return rounded_product(dot, acc_t(scale));
}

// (m, t / (1 + r), g / (1 + r)) of every row; the last one is 0 for padding.
// Shapes: gradient (L, B, H, N), query and key (L, B, H, N, d), mask (B, N), weights
// (L, B, H, N, 3).
extern "C" __global__ void score_weights(const acc_t* gradient, const real_t* query,
                                         const real_t* key, const bool* mask,
                                         long long outer, long long batch,
                                         long long heads, long long num_tokens,
                                         long long dim, long long causal, double scale,
                                         acc_t* weights) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long head = row / num_tokens, i = row % num_tokens;
    const long long sequence_start = head / heads % batch * num_tokens;  // in (B, N)
    const real_t* keys = key + head * num_tokens * dim;  // (N, d) of this head
    SoftmaxEntropy state;
    for (long long j = 0; j < (causal ? i + 1 : num_tokens); ++j)
        if (is_token(mask, sequence_start + j))
            state.add(score(query + row * dim, keys + j * dim, dim, scale));
    weights[row * STATE_VALUES] = state.m;
    weights[row * STATE_VALUES + 1] = state.t / (1 + state.r);
    weights[row * STATE_VALUES + 2] =
        is_token(mask, sequence_start + i) ? gradient[row] / (1 + state.r) : 0;
}

// Return -g p (log p + H) of a score s, from the weights of its row: p = e^d / (1 + r)
// with d = s - m.
__device__ acc_t score_gradient(const acc_t* weights, acc_t score) {
    const acc_t d = score - weights[0];
    return weights[2] * exp(d) * (weights[1] - d);
}

// One element of a band: row i and column j of a head. Its score is `scale` times the
// dot product of row_vectors[i] and column_vectors[j]. `sides` says which of the two
// terms are added.
// Shapes: row_vectors and column_vectors (L, B, H, N, d), weights (L, B, H, N, 3), mask
// (B, N), band (128 band_row_tiles, 128 T).
extern "C" __global__ void score_gradients(
    const real_t* row_vectors, const real_t* column_vectors, const acc_t* weights,
    const bool* mask, long long first_row_tile, long long band_row_tiles,
    long long batch, long long heads, long long num_tokens, long long dim,
    long long causal, double scale, long long sides, acc_t* band) {
    const long long tiles_per_head = (num_tokens + TILE_ROWS - 1) / TILE_ROWS;  // T
    const long long columns = tiles_per_head * TILE_ROWS, index = thread_index();
    if (index >= band_row_tiles * TILE_ROWS * columns) return;
    const long long band_row = index / columns, j = index % columns;
    const long long row_tile = first_row_tile + band_row / TILE_ROWS,
                    head = row_tile / tiles_per_head;
    const long long i = row_tile % tiles_per_head * TILE_ROWS + band_row % TILE_ROWS;
    const long long sequence_start = head / heads % batch * num_tokens;
    const long long head_start = head * num_tokens;

    acc_t sum = 0;
    if (i < num_tokens && j < num_tokens && is_token(mask, sequence_start + i) &&
        is_token(mask, sequence_start + j)) {
        const acc_t s = score(row_vectors + (head_start + i) * dim,
                              column_vectors + (head_start + j) * dim, dim, scale);
        // Weights belong to queries. In G the row i is the query. In Gᵀ the column j is
        // the query, so its weights and its causal condition are used: (Gᵀ)_ij = G_ji.
        if (sides & QUERIES && !(causal && j > i))
            sum += score_gradient(weights + (head_start + i) * STATE_VALUES, s);
        if (sides & KEYS && !(causal && i > j))
            sum += score_gradient(weights + (head_start + j) * STATE_VALUES, s);
    }
    band[index] = sum;
}

// One element of the gradient of a row vector: a row of the band times a column of
// `column_vectors`, times `scale`.
// Shapes: band (128 band_row_tiles, 128 T), column_vectors and out (L, B, H, N, d),
// mask (B, N).
extern "C" __global__ void token_gradients(const acc_t* band,
                                           const real_t* column_vectors,
                                           const bool* mask, long long first_row_tile,
                                           long long band_row_tiles, long long batch,
                                           long long heads, long long num_tokens,
                                           long long dim, double scale, real_t* out) {
    const long long tiles_per_head = (num_tokens + TILE_ROWS - 1) / TILE_ROWS;
    const long long index = thread_index();
    if (index >= band_row_tiles * TILE_ROWS * dim) return;
    const long long band_row = index / dim, d = index % dim;
    const long long row_tile = first_row_tile + band_row / TILE_ROWS,
                    head = row_tile / tiles_per_head;
    const long long i = row_tile % tiles_per_head * TILE_ROWS + band_row % TILE_ROWS;
    if (i >= num_tokens) return;
    const long long sequence_start = head / heads % batch * num_tokens;
    const long long head_start = head * num_tokens;

    acc_t sum = 0;
    for (long long j = 0; j < num_tokens; ++j)
        if (is_token(mask, sequence_start + j))
            sum += band[band_row * tiles_per_head * TILE_ROWS + j] *
                   widen(column_vectors[(head_start + j) * dim + d]);
    store(out + (head_start + i) * dim + d, sum * acc_t(scale));
}
