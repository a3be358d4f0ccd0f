// Gradients of the reconstruction error, see basic/reconstruction_error.cu. Here dx is
// the gradient of a loss with respect to x.
//
//   e = ‖X - X̂‖² / ‖X‖²,   scale = 2 de / ‖X‖²
//   dx_j = scale (x_j - x̂_j - e x_j),   dx̂_k = -scale sum_{j in G_k} (x_j - x̂_k)
//
// One thread, one output. Sums run in index order, so that every run gives the same
// bits.

// e (`relative`) and scale of every sequence, from the errors and squares of its
// tokens. The scale, and so the gradient, is 0 if e does not exceed `bound`: the
// fidelity loss counts only the error above it. Without a bound (-infinity) every error
// has a gradient. The scale is also 0 if all tokens are zero.
// Shapes: errors and squares (B, N), gradient, relative and scales (B,).
extern "C" __global__ void error_scales(const acc_t* errors, const acc_t* squares,
                                        const acc_t* gradient, long long batch,
                                        long long num_tokens, double bound,
                                        acc_t* relative, acc_t* scales) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    acc_t error = 0, square = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        error += errors[i];
        square += squares[i];
    }
    const acc_t e = square > 0 ? error / square : 0;
    relative[b] = e;
    scales[b] = square > 0 && e > acc_t(bound) ? 2 * gradient[b] / square : 0;
}

// dx, the gradient of the tokens; 0 for padding.
// Shapes: tokens and out (B, N, D), merged (B, K, D), labels (B, N), relative and
// scales (B,).
extern "C" __global__ void reconstruction_error_vjp(
    const real_t* tokens, const real_t* merged, const int* labels,
    const acc_t* relative, const acc_t* scales, long long batch, long long num_tokens,
    long long dim, long long num_groups, real_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= batch * num_tokens * dim) return;
    const long long token = index / dim, b = token / num_tokens;
    const int k = group_of(labels[token], num_groups);
    acc_t slope = 0;
    if (k >= 0) {
        const acc_t x = widen(tokens[index]);
        const acc_t y = widen(merged[(b * num_groups + k) * dim + index % dim]);
        slope = scales[b] * (x - y - relative[b] * x);
    }
    store(out + index, slope);
}

// dx̂, the gradient of the merged tokens.
// Shapes: tokens (B, N, D), merged and out (B, K, D), labels (B, N), scales (B,).
extern "C" __global__ void merged_error_vjp(const real_t* tokens, const real_t* merged,
                                            const int* labels, const acc_t* scales,
                                            long long batch, long long num_tokens,
                                            long long dim, long long num_groups,
                                            real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long d = index % dim;
    const long long k = index / dim % num_groups, b = index / dim / num_groups;
    const acc_t y = widen(merged[index]);
    acc_t sum = 0;
    for (long long j = b * num_tokens; j < (b + 1) * num_tokens; ++j)
        if (labels[j] == k) sum += widen(tokens[j * dim + d]) - y;
    store(out + index, -scales[b] * sum);
}
