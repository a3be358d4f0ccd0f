// Attention of queries to keys that have a bias. The T x N scores are not stored.
//
//   s_ij = q_i . k_j scale + b_j
//   Z_i = log sum_j exp(s_ij),  o_i = sum_j exp(s_ij - Z_i) v_j
//
// One thread, one output. Arrays have L layers, B sequences, H heads of keys in each
// layer, N keys of d elements, and values of `value_dim` elements. `outer` = L B H.
// Each head of keys serves `group` heads of queries, which follow one another. T is
// `num_queries`. With a causal mask, query i is that of key N - T + i, and attends to
// the keys up to this one. A key with bias -inf gets no attention. A query that attends
// to no key has o = 0 and Z = -inf.
// Shapes: query (L, B, H, group, T, d), keys (L, B, H, N, d), values (L, B, H, N,
// value_dim), bias (L, B, H, N) or null, mask (B, N), out (L, B, H, group, T,
// value_dim), log_sum_exp (L, B, H, group, T).

extern "C" __global__ void attend(const real_t* query, const real_t* keys,
                                  const real_t* values, const acc_t* bias,
                                  const bool* mask, long long outer, long long group,
                                  long long batch, long long heads,
                                  long long num_queries, long long num_keys,
                                  long long head_dim, long long value_dim,
                                  long long causal, double scale, real_t* out,
                                  acc_t* log_sum_exp) {
    const long long index = thread_index();  // (L, B, H, group, T, value_dim)
    if (index >= outer * group * num_queries * value_dim) return;
    const long long row = index / value_dim, c = index % value_dim;
    const long long i = row % num_queries, head = row / num_queries / group;
    const long long mask_start = head / heads % batch * num_keys;
    const long long end = causal ? num_keys - num_queries + i + 1 : num_keys;

    // The softmax is computed online: m is the largest score so far, r = sum_j
    // e^(s_j - m), and sum = sum_j e^(s_j - m) v_j.
    acc_t m = MASKED_SCORE, r = 0, sum = 0;
    for (long long j = 0; j < end; ++j) {
        const long long key = head * num_keys + j;
        const acc_t b = bias ? bias[key] : acc_t(0);
        if (!is_token(mask, mask_start + j) || b < MASKED_SCORE) continue;
        const acc_t s =
            score(query + row * head_dim, keys + key * head_dim, head_dim, scale) + b;
        const acc_t new_m = max(m, s);
        const acc_t rescale = exp(m - new_m), p = exp(s - new_m);
        r = r * rescale + p;
        sum = sum * rescale + p * widen(values[key * value_dim + c]);
        m = new_m;
    }
    store(out + index, r > 0 ? sum / r : acc_t(0));
    if (c == 0) log_sum_exp[row] = r > 0 ? m + log(r) : padding();
}
