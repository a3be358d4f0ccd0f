// Vector-Jacobian product of the attention received, see basic/attention_received.cu:
// from the gradient g of the result to that of the attention. n_j is the number of
// queries that may attend to token j (`counts`).
//
//   h_j = g_j / n_j,    dL / dA_ij = h_j    0 in padded rows and columns and, with a
//                                           causal mask, above the diagonal
//
//   received_weights        h_j of every token, 0 for padding
//   attention_received_vjp  the gradient of the attention
//
// The gradients of queries and keys are in score_gradients.cu. One thread, one output.
// The arguments `outer`, `batch` and `heads` are those of attention_received.cu.

// Shapes: gradient and out (L, B, H, N), counts (B, N).
extern "C" __global__ void received_weights(const acc_t* gradient, const acc_t* counts,
                                            long long outer, long long batch,
                                            long long heads, long long num_tokens,
                                            acc_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= outer * num_tokens) return;
    const long long sequence = index / num_tokens / heads % batch;
    const acc_t count = counts[sequence * num_tokens + index % num_tokens];
    out[index] = count > 0 ? gradient[index] / count : 0;
}

// Shapes: weights (L, B, H, N), mask (B, N), out (L, B, H, N, N).
extern "C" __global__ void attention_received_vjp(const acc_t* weights,
                                                  const bool* mask, long long outer,
                                                  long long batch, long long heads,
                                                  long long num_tokens,
                                                  long long causal, real_t* out) {
    const long long index = thread_index();  // (L, B, H, N, N)
    if (index >= outer * num_tokens * num_tokens) return;
    const long long row = index / num_tokens, i = row % num_tokens,
                    j = index % num_tokens;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;
    const bool seen = is_token(mask, sequence_start + i) && !(causal && j > i);
    store(out + index, seen ? weights[row - i + j] : acc_t(0));
}
