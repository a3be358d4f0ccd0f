// Vector-Jacobian product of attention entropy, see basic/attention_entropy.cu: from
// the gradient of the entropies to that of the attention.
//
//   dH_i / da_ij = -(log p_ij + H_i) / sum_k a_ik              0 where a_ij = 0
//
// If one entry dominates, log p_ij + H_i is a difference of nearly equal numbers. The
// kernel therefore divides by the largest entry m of the row: with u_j = a_ij / m,
//
//   dH_i / da_ij = (sum_k p_ik log u_k - log u_j) / (m sum_k u_k)
//
// One thread, one row. The arguments `outer`, `batch` and `heads` are those of
// attention_entropy.cu.
// Shapes: gradient (L, B, H, N), attention and out (L, B, H, N, N), mask (B, N).
extern "C" __global__ void attention_entropy_vjp(const acc_t* gradient,
                                                 const real_t* attention,
                                                 const bool* mask, long long outer,
                                                 long long batch, long long heads,
                                                 long long num_tokens, real_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;
    const real_t* a = attention + row * num_tokens;
    const bool valid = is_token(mask, sequence_start + row % num_tokens);

    acc_t m = 0, sum = 0, logs = 0;
    for (long long j = 0; j < num_tokens; ++j)
        if (valid && is_token(mask, sequence_start + j)) m = max(m, widen(a[j]));
    for (long long j = 0; j < num_tokens && m > 0; ++j) {
        const acc_t u = widen(a[j]) / m;
        if (u > 0 && is_token(mask, sequence_start + j)) {
            sum += u;
            logs += u * log(u);
        }
    }
    const acc_t mean = logs / sum, weight = gradient[row] / (m * sum);
    for (long long j = 0; j < num_tokens; ++j) {
        const acc_t u = widen(a[j]) / m;
        const bool seen = m > 0 && u > 0 && is_token(mask, sequence_start + j);
        // If g / (m sum) overflows, the product with a difference of 0 is 0, not NaN.
        const acc_t slope = seen ? weight * (mean - log(u)) : acc_t(0);
        store(out + row * num_tokens + j, slope == slope ? slope : acc_t(0));
    }
}
