// Saliency: how much each token matters, from the entropy of its attention.
//
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//   s_i = 1 - mean_l normalize(H_i^(l))    normalize = min-max over a row's tokens
//
// p is given (attention_entropy), or the softmax of q_i . k_j scale (query_key_entropy)
// or of x_i . x_j / sqrt(D) (self_attention_entropy); then no N x N array is stored.
// Given probabilities a need not sum to 1: p = a / S with S = sum_j a_ij, and so
//
//   H_i = log S - sum_j a_ij log a_ij / S
//
// One thread, one output. `outer` runs over (L, B, H), so that the sequence of an outer
// index, which its mask needs, is outer / heads % batch.

extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence = row / num_tokens / heads % batch;
    const long long first = sequence * num_tokens;  // of this sequence in the mask

    acc_t sum = 0, logs = 0;
    if (is_token(mask, first + row % num_tokens)) {
        for (long long j = 0; j < num_tokens; ++j) {
            const acc_t a = widen(attention[row * num_tokens + j]);
            if (a > 0 && is_token(mask, first + j)) {
                sum += a;
                logs += a * log(a);
            }
        }
    }
    // Rounding may leave less than nothing; a row without attention has no entropy.
    out[row] = sum > 0 ? max(log(sum) - logs / sum, acc_t(0)) : 0;
}

// The entropy of query's attention over the first `num_keys` keys.
__device__ acc_t row_entropy(const real_t* query, const real_t* keys, const bool* mask,
                             long long first, long long num_keys, long long dim,
                             acc_t scale) {
    SoftmaxEntropy entropy;
    for (long long j = 0; j < num_keys; ++j) {
        if (!is_token(mask, first + j)) continue;
        acc_t dot = 0;
        for (long long d = 0; d < dim; ++d)
            dot += widen(query[d]) * widen(keys[j * dim + d]);
        entropy.add(dot * scale);
    }
    return entropy.value();
}

extern "C" __global__ void query_key_entropy(const real_t* query, const real_t* key,
                                             const bool* mask, long long outer,
                                             long long batch, long long heads,
                                             long long num_tokens, long long head_dim,
                                             long long causal, double scale,
                                             acc_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long i = row % num_tokens;
    const long long first = row / num_tokens / heads % batch * num_tokens;

    // A padded token attends to nothing. A causal one ends at itself.
    acc_t entropy = 0;
    if (is_token(mask, first + i)) {
        const real_t* keys = key + (row - i) * head_dim;  // (N, d) of this head
        entropy = row_entropy(query + row * head_dim, keys, mask, first,
                              causal ? i + 1 : num_tokens, head_dim, scale);
    }
    out[row] = entropy;
}

extern "C" __global__ void self_attention_entropy(const real_t* tokens,
                                                  const bool* mask, long long batch,
                                                  long long num_tokens, long long dim,
                                                  acc_t* out) {
    const long long row = thread_index();  // (B, N)
    if (row >= batch * num_tokens) return;
    const long long first = row - row % num_tokens;
    acc_t entropy = 0;
    if (is_token(mask, row)) {
        const acc_t scale = 1 / sqrt(static_cast<acc_t>(dim));
        entropy = row_entropy(tokens + row * dim, tokens + first * dim, mask, first,
                              num_tokens, dim, scale);
    }
    out[row] = entropy;
}

// ‖x‖₂ of every row, 0 of padding.
extern "C" __global__ void token_norms(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index();  // (B, N)
    if (row >= num_rows) return;
    acc_t squares = 0;
    for (long long d = 0; d < dim && is_token(mask, row); ++d) {
        const acc_t x = widen(tokens[row * dim + d]);
        squares += x * x;
    }
    out[row] = sqrt(squares);
}

// Token i's entropy in one layer of one sequence, averaged over the heads (H, N).
__device__ acc_t head_mean(const real_t* entropy, long long heads, long long num_tokens,
                           long long i) {
    acc_t sum = 0;
    for (long long h = 0; h < heads; ++h) sum += widen(entropy[h * num_tokens + i]);
    return sum / heads;
}

// The least and the greatest entropy of a layer's valid tokens.
extern "C" __global__ void entropy_range(const real_t* entropy, const bool* mask,
                                         long long layers, long long batch,
                                         long long heads, long long num_tokens,
                                         acc_t* lowest, acc_t* highest) {
    const long long index = thread_index();  // (L, B)
    if (index >= layers * batch) return;
    acc_t low = -NEVER, high = NEVER;
    for (long long i = 0; i < num_tokens; ++i) {
        if (!is_token(mask, index % batch * num_tokens + i)) continue;
        const acc_t h =
            head_mean(entropy + index * heads * num_tokens, heads, num_tokens, i);
        low = min(low, h);
        high = max(high, h);
    }
    lowest[index] = low;
    highest[index] = high;
}

extern "C" __global__ void saliency(const real_t* entropy, const bool* mask,
                                    const acc_t* lowest, const acc_t* highest,
                                    long long layers, long long batch, long long heads,
                                    long long num_tokens, long long salient_high,
                                    acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    acc_t sum = 0;
    for (long long l = 0; l < layers; ++l) {
        const long long row = l * batch + b;  // of (L, B)
        const acc_t width = highest[row] - lowest[row];
        const acc_t h =
            head_mean(entropy + row * heads * num_tokens, heads, num_tokens, i);
        if (width > 0) sum += (h - lowest[row]) / width;  // a constant row counts as 0
    }
    const acc_t mean = sum / layers;
    const acc_t salient = salient_high ? mean : 1 - mean;
    out[index] = is_token(mask, index) ? salient : 0;
}
