// Cosine similarity of every two tokens of a sequence.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 if either norm is 0
//
// One thread computes one output. Norms come from token_norms.cu, and `cosine` from
// cosine.cuh.
// Shapes: tokens (B, N, D), norms (B, N), out (B, N, N).

extern "C" __global__ void cosine_similarity(const real_t* tokens, const acc_t* norms,
                                             long long batch, long long num_tokens,
                                             long long dim, acc_t* out) {
    const long long index = thread_index();  // (B, N, N)
    if (index >= batch * num_tokens * num_tokens) return;
    const long long b = index / num_tokens / num_tokens;
    // Outputs (i, j) and (j, i) both compute with i <= j: the same sum in the same
    // order, so the matrix is exactly symmetric.
    const long long row = index / num_tokens % num_tokens, column = index % num_tokens;
    const long long i = b * num_tokens + min(row, column);
    const long long j = b * num_tokens + max(row, column);
    const acc_t similarity =
        cosine(tokens + i * dim, tokens + j * dim, norms[i], norms[j], dim);
    // Clamp, because rounding may exceed [-1, 1]. NaN stays NaN: comparisons with it
    // are false.
    out[index] = similarity > 1 ? 1 : similarity < -1 ? -1 : similarity;
}
