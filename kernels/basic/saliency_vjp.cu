// Vector-Jacobian products of saliency: from the gradient of entropies, or of what is
// made of them, to that of what they are made of.
//
// A softmax's entropy has the slopes
//
//   dH_i / ds_ij = -p_ij (log p_ij + H_i),    log p_ij + H_i = (s_ij - m) - t / (1 + r)
//
// with (m, r, t) of row i as in SoftmaxEntropy, so that nothing cancels where one score
// stands above the rest. Scores are found again, and their gradients G stored for a
// band of rows at a time, never N x N:
//
//   score_weights     (m, t / (1 + r), g / (1 + r)) of every row, g its gradient
//   score_gradients   a band of G, whose rows are queries, or of Gᵀ, whose are keys
//   token_gradients   the band times the tokens of its columns
//
// A band holds whole tiles of 128 rows of (L, B, H, T), T of them to a head, and in
// each row 128 T columns; `sides` says what its rows are: 1 queries, 2 keys, 3 both at
// once, which is G + Gᵀ where queries and keys are the same tokens.
//
// One thread, one output.

constexpr long long BAND_ROWS = 128;  // of a tile

__device__ acc_t score(const real_t* a, const real_t* b, long long dim, double scale) {
    acc_t dot = 0;
    for (long long d = 0; d < dim; ++d) dot += widen(a[d]) * widen(b[d]);
    return rounded_product(dot, acc_t(scale));
}

extern "C" __global__ void score_weights(const acc_t* gradient, const real_t* query,
                                         const real_t* key, const bool* mask,
                                         long long outer, long long batch,
                                         long long heads, long long num_tokens,
                                         long long dim, long long causal, double scale,
                                         acc_t* weights) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long head = row / num_tokens, i = row % num_tokens;
    const long long first = head / heads % batch * num_tokens;  // in the mask
    const real_t* keys = key + head * num_tokens * dim;         // (N, d) of this head
    SoftmaxEntropy state;
    for (long long j = 0; j < (causal ? i + 1 : num_tokens); ++j)
        if (is_token(mask, first + j))
            state.add(score(query + row * dim, keys + j * dim, dim, scale));
    weights[row * 3] = state.m;
    weights[row * 3 + 1] = state.t / (1 + state.r);
    weights[row * 3 + 2] =
        is_token(mask, first + i) ? gradient[row] / (1 + state.r) : 0;
}

// -g p (log p + H) of a score, by the weights of its row.
__device__ acc_t score_gradient(const acc_t* weights, acc_t score) {
    const acc_t d = score - weights[0];
    return weights[2] * exp(d) * (weights[1] - d);
}

extern "C" __global__ void score_gradients(const real_t* own, const real_t* other,
                                           const acc_t* weights, const bool* mask,
                                           long long first_tile, long long num_tiles,
                                           long long batch, long long heads,
                                           long long num_tokens, long long dim,
                                           long long causal, double scale,
                                           long long sides, acc_t* band) {
    const long long tiles = (num_tokens + BAND_ROWS - 1) / BAND_ROWS;  // of a head
    const long long columns = tiles * BAND_ROWS, index = thread_index();
    if (index >= num_tiles * BAND_ROWS * columns) return;
    const long long band_row = index / columns, j = index % columns;
    const long long tile = first_tile + band_row / BAND_ROWS, head = tile / tiles;
    const long long i = tile % tiles * BAND_ROWS + band_row % BAND_ROWS;
    const long long first = head / heads % batch * num_tokens;
    const long long start = head * num_tokens;

    acc_t sum = 0;
    if (i < num_tokens && j < num_tokens && is_token(mask, first + i) &&
        is_token(mask, first + j)) {
        const acc_t s =
            score(own + (start + i) * dim, other + (start + j) * dim, dim, scale);
        if (sides & 1 && !(causal && j > i))
            sum += score_gradient(weights + (start + i) * 3, s);
        if (sides & 2 && !(causal && i > j))
            sum += score_gradient(weights + (start + j) * 3, s);
    }
    band[index] = sum;
}

extern "C" __global__ void token_gradients(const acc_t* band, const real_t* other,
                                           const bool* mask, long long first_tile,
                                           long long num_tiles, long long batch,
                                           long long heads, long long num_tokens,
                                           long long dim, double scale, real_t* out) {
    const long long tiles = (num_tokens + BAND_ROWS - 1) / BAND_ROWS;
    const long long index = thread_index();
    if (index >= num_tiles * BAND_ROWS * dim) return;
    const long long band_row = index / dim, d = index % dim;
    const long long tile = first_tile + band_row / BAND_ROWS, head = tile / tiles;
    const long long i = tile % tiles * BAND_ROWS + band_row % BAND_ROWS;
    if (i >= num_tokens) return;
    const long long first = head / heads % batch * num_tokens;
    const long long start = head * num_tokens;

    acc_t sum = 0;
    for (long long j = 0; j < num_tokens; ++j)
        if (is_token(mask, first + j))
            sum += band[band_row * tiles * BAND_ROWS + j] *
                   widen(other[(start + j) * dim + d]);
    store(out + (start + i) * dim + d, sum * acc_t(scale));
}

// dH_i / da_ij = -(log p_ij + H_i) / sum_k a_ik, and 0 where a_ij = 0. Relative to the
// row's largest entry m, u = a / m, it is (sum_k p_ik log u_k - log u_j) / (m sum_k
// u_k). One thread, one row.
extern "C" __global__ void attention_entropy_vjp(const acc_t* gradient,
                                                 const real_t* attention,
                                                 const bool* mask, long long outer,
                                                 long long batch, long long heads,
                                                 long long num_tokens, real_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long first = row / num_tokens / heads % batch * num_tokens;
    const real_t* a = attention + row * num_tokens;
    const bool valid = is_token(mask, first + row % num_tokens);

    acc_t m = 0, sum = 0, logs = 0;
    for (long long j = 0; j < num_tokens; ++j)
        if (valid && is_token(mask, first + j)) m = max(m, widen(a[j]));
    for (long long j = 0; j < num_tokens && m > 0; ++j) {
        const acc_t u = widen(a[j]) / m;
        if (u > 0 && is_token(mask, first + j)) {
            sum += u;
            logs += u * log(u);
        }
    }
    const acc_t mean = logs / sum, weight = gradient[row] / (m * sum);
    for (long long j = 0; j < num_tokens; ++j) {
        const acc_t u = widen(a[j]) / m;
        const bool seen = m > 0 && u > 0 && is_token(mask, first + j);
        store(out + row * num_tokens + j, seen ? weight * (mean - log(u)) : acc_t(0));
    }
}

// Token i's entropy in one layer of one sequence, averaged over the heads (H, N).
__device__ acc_t head_mean(const real_t* entropy, long long heads, long long num_tokens,
                           long long i) {
    acc_t sum = 0;
    for (long long h = 0; h < heads; ++h) sum += widen(entropy[h * num_tokens + i]);
    return sum / heads;
}

// What min-max scaling, y = (h - low) / (high - low), needs of a layer's valid tokens
// to be gone back through: low, high, and what the gradient takes from each token
// there,
//
//   sum g (1 - y) / n_low,   sum g y / n_high      where n tokens tie
//
// One thread, one layer of one sequence. extremes: (L, B, 4).
extern "C" __global__ void entropy_extremes(const acc_t* gradient,
                                            const real_t* entropy, const bool* mask,
                                            long long layers, long long batch,
                                            long long heads, long long num_tokens,
                                            acc_t* extremes) {
    const long long row = thread_index();  // (L, B)
    if (row >= layers * batch) return;
    const long long first = row % batch * num_tokens;  // of (B, N)
    entropy += row * heads * num_tokens;
    acc_t low = -NEVER, high = NEVER;
    for (long long i = 0; i < num_tokens; ++i) {
        if (!is_token(mask, first + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        low = min(low, h);
        high = max(high, h);
    }
    acc_t at_low = 0, at_high = 0, from_low = 0, from_high = 0;
    for (long long i = 0; i < num_tokens && high > low; ++i) {
        if (!is_token(mask, first + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        const acc_t y = (h - low) / (high - low);
        at_low += h == low;
        at_high += h == high;
        from_low += gradient[first + i] * (1 - y);
        from_high += gradient[first + i] * y;
    }
    extremes[row * 4] = low;
    extremes[row * 4 + 1] = high;
    extremes[row * 4 + 2] = from_low / max(at_low, acc_t(1));
    extremes[row * 4 + 3] = from_high / max(at_high, acc_t(1));
}

extern "C" __global__ void saliency_vjp(const acc_t* gradient, const real_t* entropy,
                                        const bool* mask, const acc_t* extremes,
                                        long long layers, long long batch,
                                        long long heads, long long num_tokens,
                                        long long salient_high, real_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= layers * batch * heads * num_tokens) return;
    const long long row = index / num_tokens / heads, i = index % num_tokens;  // (L, B)
    const long long token = row % batch * num_tokens + i;
    const acc_t* of_row = extremes + row * 4;
    const acc_t width = of_row[1] - of_row[0];
    acc_t slope = 0;
    if (is_token(mask, token) && width > 0) {
        const acc_t h =
            head_mean(entropy + row * heads * num_tokens, heads, num_tokens, i);
        slope = gradient[token];
        if (h == of_row[0]) slope -= of_row[2];
        if (h == of_row[1]) slope -= of_row[3];
        slope /= width * (salient_high ? layers : -layers) * heads;
    }
    store(out + index, slope);
}

// dn / dx = x / n of a norm n, and 0 where it is 0; `gradient` is that of the norms.
extern "C" __global__ void token_norms_vjp(const acc_t* gradient, const real_t* tokens,
                                           const acc_t* norms, long long num_rows,
                                           long long dim, real_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= num_rows * dim) return;
    const acc_t norm = norms[index / dim];
    const acc_t x = norm > 0 ? widen(tokens[index]) / norm : acc_t(0);
    store(out + index, norm > 0 ? gradient[index / dim] * x : acc_t(0));
}
