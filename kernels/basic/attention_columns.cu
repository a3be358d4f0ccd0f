// Sums of the attention of queries to each key, or the largest attention.
//
//   s_ij = q_i . k_j scale + b_j
//   a_j = sum_i exp(power (s_ij - Z_i))    over the queries i of all heads of a group
//   a_j = max_i exp(s_ij - Z_i)            if power is 0
//
// One thread, one output. Z is `log_sum_exp`; a query with Z = -inf adds nothing. The
// letters and the masks are those of attend.cu. An exponent is at most 80, because Z
// may belong to other keys.
// Shapes: query (L, B, H, group, T, d), keys (L, B, H, N, d), log_sum_exp (L, B, H,
// group, T), bias (L, B, H, N) or null, mask (B, N), out (L, B, H, N).

extern "C" __global__ void attention_columns(
    const real_t* query, const real_t* keys, const acc_t* log_sum_exp,
    const acc_t* bias, const bool* mask, long long outer, long long group,
    long long batch, long long heads, long long num_queries, long long num_keys,
    long long head_dim, long long causal, double scale, long long power, acc_t* out) {
    const long long key = thread_index();  // (L, B, H, N)
    if (key >= outer * num_keys) return;
    const long long head = key / num_keys, j = key % num_keys;
    const acc_t b = bias ? bias[key] : acc_t(0);

    acc_t sum = 0;
    if (is_token(mask, head / heads % batch * num_keys + j) && !(b < MASKED_SCORE)) {
        for (long long g = 0; g < group * num_queries; ++g) {
            const long long row = head * group * num_queries + g;
            const long long last = num_keys - num_queries + g % num_queries;
            const acc_t z = log_sum_exp[row];
            if ((causal && j > last) || z < MASKED_SCORE) continue;
            const acc_t s =
                score(query + row * head_dim, keys + key * head_dim, head_dim, scale);
            const acc_t p = power ? acc_t(power) : acc_t(1);
            const acc_t a = exp(min(p * (s + b - z), acc_t(80)));
            sum = power ? sum + a : max(sum, a);
        }
    }
    out[key] = sum;
}
