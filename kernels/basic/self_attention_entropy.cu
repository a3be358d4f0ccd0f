// Entropy of the attention of tokens to each other. The N x N scores are not stored.
//
//   p_ij = softmax_j(x_i . x_j / sqrt(D))
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//
// One thread, one output. `row_entropy` is in row_entropy.cuh.
// Shapes: tokens (B, N, D), mask and out (B, N).

extern "C" __global__ void self_attention_entropy(const real_t* tokens,
                                                  const bool* mask, long long batch,
                                                  long long num_tokens, long long dim,
                                                  acc_t* out) {
    const long long row = thread_index();  // (B, N)
    if (row >= batch * num_tokens) return;
    const long long sequence_start = row - row % num_tokens;
    acc_t entropy = 0;
    if (is_token(mask, row)) {
        const acc_t scale = 1 / sqrt(static_cast<acc_t>(dim));
        entropy = row_entropy(tokens + row * dim, tokens + sequence_start * dim, mask,
                              sequence_start, num_tokens, dim, scale);
    }
    out[row] = entropy;
}
