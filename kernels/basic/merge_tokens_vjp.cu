// Gradients of merging, see basic/merge_tokens.cu. Here dx is the gradient of a loss
// with respect to x. The index k belongs to groups, and i and j belong to tokens: x_k
// is the merged token of group k. A member j of this group has the weight w_j in x_k:
//
//   M_k = sum_{i in G_k} m_i,   w_j = m_j / M_k,   x_k = sum_{j in G_k} w_j x_j
//   dx_j = w_j dx_k
//   dm_j = (dx_k . x_j - sum_{i in G_k} w_i dx_k . x_i) / M_k
//
// A group of mass 0 is merged to its plain mean: its weights are 1 / |G_k| and its dm
// is 0. The same holds for all groups if `mass` is null. One thread, one output. Sums
// run in index order, so that every run gives the same bits.

// The weight w_j of every token in its group; 0 for padding.
// Shapes: mass, labels and out (B, N).
extern "C" __global__ void member_weights(const acc_t* mass, const int* labels,
                                          long long batch, long long num_tokens,
                                          long long num_groups, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long sequence_start = index - index % num_tokens;
    const int k = group_of(labels[index], num_groups);
    acc_t size = 0, total = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j) {
        if (labels[j] != k) continue;
        size += 1;
        if (mass != nullptr) total += mass[j];
    }
    acc_t scale = 1;
    if (!is_finite(total)) {  // the sum overflows: shrink the masses
        scale = acc_t(1) / (1ll << 32);
        total = 0;
        for (long long j = sequence_start; j < sequence_start + num_tokens; ++j)
            if (labels[j] == k) total += mass[j] * scale;
    }
    out[index] = k < 0 ? 0 : total != 0 ? mass[index] * scale / total : 1 / size;
}

// dx_j = w_j dx_k; 0 for padding.
// Shapes: gradient (B, K, D), labels and weights (B, N), out (B, N, D).
extern "C" __global__ void merge_tokens_vjp(const real_t* gradient, const int* labels,
                                            const acc_t* weights, long long batch,
                                            long long num_tokens, long long dim,
                                            long long num_groups, real_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= batch * num_tokens * dim) return;
    const long long token = index / dim, b = token / num_tokens;
    const int k = group_of(labels[token], num_groups);
    acc_t slope = 0;
    if (k >= 0)
        slope =
            weights[token] * widen(gradient[(b * num_groups + k) * dim + index % dim]);
    store(out + index, slope);
}

// dx_k . x_j of every token; 0 for padding.
// Shapes: gradient (B, K, D), tokens (B, N, D), labels and out (B, N).
extern "C" __global__ void member_products(const real_t* gradient, const real_t* tokens,
                                           const int* labels, long long batch,
                                           long long num_tokens, long long dim,
                                           long long num_groups, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const int k = group_of(labels[index], num_groups);
    const real_t* x = tokens + index * dim;                                    // (D,)
    const real_t* y = gradient + (index / num_tokens * num_groups + k) * dim;  // (D,)
    acc_t sum = 0;
    for (long long d = 0; d < dim && k >= 0; ++d) sum += widen(x[d]) * widen(y[d]);
    out[index] = sum;
}

// dm_j, from the weights of `member_weights` and the products of `member_products`.
// Shapes: all arrays (B, N).
extern "C" __global__ void merge_mass_vjp(const acc_t* mass, const int* labels,
                                          const acc_t* weights, const acc_t* products,
                                          long long batch, long long num_tokens,
                                          long long num_groups, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long sequence_start = index - index % num_tokens;
    const int k = group_of(labels[index], num_groups);
    acc_t total = 0, mean = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j) {
        if (labels[j] != k || k < 0) continue;
        total += mass[j];
        mean += weights[j] * products[j];
    }
    out[index] = total != 0 ? (products[index] - mean) / total : 0;
}
