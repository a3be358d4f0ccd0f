// Vector-Jacobian products through the softmax of scores: from the gradient of the
// entropies, or of the attention received, to that of queries and keys, or of tokens.
// See basic/query_key_entropy.cu, basic/self_attention_entropy.cu and
// basic/attention_received.cu.
//
// The entropy of a softmax has the derivatives
//
//   dH_i / ds_ij = -p_ij (log p_ij + H_i),    log p_ij + H_i = (s_ij - m) - t / (1 + r)
//
// with (m, r, t) of row i as in SoftmaxEntropy (common.cuh), so that nothing cancels if
// one score lies far above the rest. With the gradient g_i of H_i, the gradient of the
// scores is G_ij = g_i dH_i / ds_ij. For the attention received, with h_j of
// basic/attention_received_vjp.cu (`key_weights`; null for entropies),
//
//   G_ij = p_ij (h_j - o_i),    o_i = sum_k p_ik h_k
//
// The N x N matrix G is never stored: scores are computed again, and G is computed for
// one band of rows at a time.
//
//   score_weights     (m, t / (1 + r), g / (1 + r)) of every row; a null gradient means
//                     g = 1. For the attention received, `attention_means`
//                     (attention_received.cu) replaces these by (m, o, 1 / (1 + r))
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
// One thread, one output. `score` is in score.cuh.

constexpr long long TILE_ROWS = TILE;

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
    const acc_t g = gradient ? gradient[row] : 1;
    weights[row * STATE_VALUES + 2] =
        is_token(mask, sequence_start + i) ? g / (1 + state.r) : 0;
}

// Return the gradient of a score s, from the weights of its row and, for the attention
// received, the weight h of its key: -g p (log p + H) or p (h - o). p = e^d / (1 + r)
// with d = s - m.
__device__ acc_t score_gradient(const acc_t* weights, const acc_t* key_weight,
                                acc_t score) {
    const acc_t d = score - weights[0];
    const acc_t factor = key_weight ? *key_weight - weights[1] : weights[1] - d;
    return weights[2] * exp(d) * factor;
}

// One element of a band: row i and column j of a head. Its score is `scale` times the
// dot product of row_vectors[i] and column_vectors[j]. `sides` says which of the two
// terms are added.
// Shapes: row_vectors and column_vectors (L, B, H, N, d), weights (L, B, H, N, 3),
// key_weights (L, B, H, N), mask (B, N), band (128 band_row_tiles, 128 T).
extern "C" __global__ void score_gradients(
    const real_t* row_vectors, const real_t* column_vectors, const acc_t* weights,
    const acc_t* key_weights, const bool* mask, long long first_row_tile,
    long long band_row_tiles, long long batch, long long heads, long long num_tokens,
    long long dim, long long causal, double scale, long long sides, acc_t* band) {
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
        // In G the row i is the query and the column j the key. In Gᵀ the column is the
        // query, so its weights and its causal condition are used: (Gᵀ)_ij = G_ji.
        const acc_t* of_keys = key_weights ? key_weights + head_start : nullptr;
        if (sides & QUERIES && !(causal && j > i))
            sum += score_gradient(weights + (head_start + i) * STATE_VALUES,
                                  of_keys ? of_keys + j : nullptr, s);
        if (sides & KEYS && !(causal && i > j))
            sum += score_gradient(weights + (head_start + j) * STATE_VALUES,
                                  of_keys ? of_keys + i : nullptr, s);
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
