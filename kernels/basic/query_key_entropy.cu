// Entropy of the attention of queries to keys. No N x N array is stored.
//
//   p_ij = softmax_j(q_i . k_j scale)
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//
// One thread, one output. `outer` runs over (L, B, H), so that the sequence of an outer
// index, which its mask needs, is outer / heads % batch.

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
