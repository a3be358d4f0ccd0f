// Attention received: the mean attention that each token gets from the queries.
//
//   r_j = (1 / n_j) sum_i A_ij           over the n_j queries i that may attend to j
//
// These are all tokens or, with a causal mask, the tokens i >= j. Padding is not
// counted, and r_j is 0 for padding. The attention A comes from the input, or from
// queries and keys:
//
//   A_ij = e^(s_ij - m_i) w_i,    s_ij = q_i . k_j scale,    m_i = max_j s_ij,
//   w_i = 1 / sum_j e^(s_ij - m_i)
//
//   query_counts        n_j of every token, 0 for padding
//   attention_received  r from the attention
//   query_key_received  r from queries and keys; `score_weights` (score_gradients.cu)
//                       has computed (m_i, -, w_i) of every row i, w_i = 0 for padding
//   attention_means     for the gradient: o_i = sum_j A_ij h_j of values h_j; o_i
//                       replaces the second weight of row i
//
// One thread, one output. Arrays have L layers, B sequences, H heads in each layer, N
// tokens, and d elements in a query or key. `outer` = L B H is the number of all heads.
// They are numbered in the order of the axes (L, B, H): head h belongs to sequence h /
// heads % batch, which has one row of the mask. `score` is in score.cuh.

// Shapes: mask and counts (B, N).
extern "C" __global__ void query_counts(const bool* mask, long long batch,
                                        long long num_tokens, long long causal,
                                        acc_t* counts) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long j = index % num_tokens, sequence_start = index - j;
    acc_t count = 0;
    for (long long i = causal ? j : 0; i < num_tokens; ++i)
        if (is_token(mask, sequence_start + i)) ++count;
    counts[index] = is_token(mask, index) ? count : 0;
}

// Shapes: attention (L, B, H, N, N), mask and counts (B, N), out (L, B, H, N).
extern "C" __global__ void attention_received(const real_t* attention, const bool* mask,
                                              const acc_t* counts, long long outer,
                                              long long batch, long long heads,
                                              long long num_tokens, long long causal,
                                              acc_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= outer * num_tokens) return;
    const long long j = index % num_tokens, head_start = index - j;
    const long long sequence_start = index / num_tokens / heads % batch * num_tokens;

    acc_t sum = 0;
    for (long long i = causal ? j : 0; i < num_tokens; ++i)
        if (is_token(mask, sequence_start + i))
            sum += widen(attention[(head_start + i) * num_tokens + j]);
    const acc_t count = counts[sequence_start + j];
    out[index] = count > 0 ? sum / count : 0;
}

// Shapes: query and key (L, B, H, N, d), weights (L, B, H, N, 3), mask and counts
// (B, N), out (L, B, H, N).
extern "C" __global__ void query_key_received(const real_t* query, const real_t* key,
                                              const acc_t* weights, const bool* mask,
                                              const acc_t* counts, long long outer,
                                              long long batch, long long heads,
                                              long long num_tokens, long long head_dim,
                                              long long causal, double scale,
                                              acc_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= outer * num_tokens) return;
    const long long j = index % num_tokens, head_start = index - j;
    const long long sequence_start = index / num_tokens / heads % batch * num_tokens;

    acc_t sum = 0;
    for (long long i = causal ? j : 0; i < num_tokens; ++i) {
        if (!is_token(mask, sequence_start + i)) continue;
        const acc_t* row = weights + (head_start + i) * STATE_VALUES;
        const acc_t s = score(query + (head_start + i) * head_dim,
                              key + index * head_dim, head_dim, scale);
        sum += exp(s - row[0]) * row[2];
    }
    const acc_t count = counts[sequence_start + j];
    out[index] = count > 0 ? sum / count : 0;
}

// Shapes: values (L, B, H, N), query and key (L, B, H, N, d), mask (B, N), weights (L,
// B, H, N, 3), which are read and written.
extern "C" __global__ void attention_means(const acc_t* values, const real_t* query,
                                           const real_t* key, const bool* mask,
                                           long long outer, long long batch,
                                           long long heads, long long num_tokens,
                                           long long head_dim, long long causal,
                                           double scale, acc_t* weights) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= outer * num_tokens) return;
    const long long i = index % num_tokens, head_start = index - i;
    const long long sequence_start = index / num_tokens / heads % batch * num_tokens;
    acc_t* row = weights + index * STATE_VALUES;

    acc_t sum = 0;
    for (long long j = 0; j < (causal ? i + 1 : num_tokens); ++j) {
        if (!is_token(mask, sequence_start + j)) continue;
        const acc_t s = score(query + index * head_dim,
                              key + (head_start + j) * head_dim, head_dim, scale);
        sum += exp(s - row[0]) * values[head_start + j];
    }
    row[1] = sum * row[2];
}
