// Clustering: the similarities that groups are made from.
//
//   sim_ij = x_i . x_j / (‖x_i‖ ‖x_j‖)     0 where either norm is 0
//
// One thread, one output. Norms come from token_norms (saliency.cu).

__device__ acc_t cosine(const real_t* x, const real_t* y, acc_t norm_x, acc_t norm_y,
                        long long dim) {
    if (norm_x == 0 || norm_y == 0) return 0;
    acc_t dot = 0;
    for (long long d = 0; d < dim; ++d) dot += widen(x[d]) * widen(y[d]);
    return dot / norm_x / norm_y;
}

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
    out[index] = cosine(tokens + i * dim, tokens + j * dim, norms[i], norms[j], dim);
}

// The most similar of a sequence's K anchors; of equal ones the lowest.
extern "C" __global__ void nearest_anchors(const real_t* tokens, const acc_t* norms,
                                           const real_t* anchors,
                                           const acc_t* anchor_norms, const int* counts,
                                           long long batch, long long num_tokens,
                                           long long dim, long long num_groups,
                                           int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const long long first = b * num_groups;  // anchor of (B, K)
    const long long count = count_of(counts, b, num_groups);
    int best = 0;
    acc_t highest = NEVER;
    for (long long k = 0; k < count; ++k) {
        const acc_t similarity =
            cosine(tokens + index * dim, anchors + (first + k) * dim, norms[index],
                   anchor_norms[first + k], dim);
        if (similarity > highest) {
            highest = similarity;
            best = static_cast<int>(k);
        }
    }
    out[index] = best;
}
