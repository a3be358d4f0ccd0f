// Entropy of the attention of queries to keys. The N x N scores are not stored.
//
//   p_ij = softmax_j(q_i . k_j scale)
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//
// One thread, one output. Arrays have L layers, B sequences, H heads in each layer, N
// tokens, and d elements in a query or key. `outer` = L B H is the number of all heads.
// They are numbered in the order of the axes (L, B, H): head h belongs to sequence h /
// heads % batch, which has one row of the mask.
// Shapes: query and key (L, B, H, N, d), mask (B, N), out (L, B, H, N).

extern "C" __global__ void query_key_entropy(const real_t* query, const real_t* key,
                                             const bool* mask, long long outer,
                                             long long batch, long long heads,
                                             long long num_tokens, long long head_dim,
                                             long long causal, double scale,
                                             acc_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long i = row % num_tokens;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;

    // A padded token attends to nothing, and its entropy is 0. With a causal mask,
    // token i attends to the tokens up to itself. `row_entropy` is in row_entropy.cuh.
    acc_t entropy = 0;
    if (is_token(mask, sequence_start + i)) {
        const real_t* keys = key + (row - i) * head_dim;  // (N, d) of this head
        entropy = row_entropy(query + row * head_dim, keys, mask, sequence_start,
                              causal ? i + 1 : num_tokens, head_dim, scale);
    }
    out[row] = entropy;
}
