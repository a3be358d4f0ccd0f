// Cosine similarity: the similarities that groups are made from.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 where either norm is 0
//
// One thread, one output. Norms come from token_norms.cu.

extern "C" __global__ void cosine_similarity(const real_t* tokens, const acc_t* norms,
                                             long long batch, long long num_tokens,
                                             long long dim, acc_t* out) {
    const long long index = thread_index();  // (B, N, N)
    if (index >= batch * num_tokens * num_tokens) return;
    const long long b = index / num_tokens / num_tokens;
    // i <= j, whichever of the two this output is, so that the matrix is symmetric.
    const long long row = index / num_tokens % num_tokens, column = index % num_tokens;
    const long long i = b * num_tokens + min(row, column);
    const long long j = b * num_tokens + max(row, column);
    const acc_t similarity =
        cosine(tokens + i * dim, tokens + j * dim, norms[i], norms[j], dim);
    // Within [-1, 1] but for rounding; a NaN stays one.
    out[index] = similarity > 1 ? 1 : similarity < -1 ? -1 : similarity;
}
