// Gradients of merging, with the member lists of members.cuh; see
// basic/merge_tokens_vjp.cu for the formulas.

// The weight of each member in its group. One warp, one group. The values of padding
// are not written.
// Shapes: mass, members and out (B, N), ends (B, K).
extern "C" __global__ void member_weights(const acc_t* mass, const int* ends,
                                          const int* members, long long batch,
                                          long long num_tokens, long long num_groups,
                                          acc_t* out) {
    const long long group_index = thread_index() / 32;  // (B, K)
    if (group_index >= batch * num_groups) return;
    const int lane = threadIdx.x % 32;
    const Members group =
        members_of(ends, members, group_index, num_tokens, num_groups);
    const acc_t size = static_cast<acc_t>(group.end - group.start);
    acc_t total = 0;
    for (int entry = group.start + lane; mass && entry < group.end; entry += 32)
        total += mass[group.sequence_start + group.tokens[entry]];
    total = warp_reduce(total, Add());
    acc_t scale = 1;
    if (!is_finite(total)) {  // the sum overflows: shrink the masses
        scale = acc_t(1) / (1ll << 32);
        total = 0;
        for (int entry = group.start + lane; entry < group.end; entry += 32)
            total += mass[group.sequence_start + group.tokens[entry]] * scale;
        total = warp_reduce(total, Add());
    }
    for (int entry = group.start + lane; entry < group.end; entry += 32) {
        const long long j = group.sequence_start + group.tokens[entry];
        out[j] = total != 0 ? mass[j] * scale / total : 1 / size;
    }
}

// One warp, one token: the gradient dx_j = w_j dx_k of the token and, unless `products`
// is null, the product dx_k . x_j. Both are 0 for padding.
// Shapes: gradient (B, K, D), tokens and out (B, N, D), labels, weights and products
// (B, N).
extern "C" __global__ void merge_tokens_vjp(const real_t* gradient,
                                            const real_t* tokens, const int* labels,
                                            const acc_t* weights, long long batch,
                                            long long num_tokens, long long dim,
                                            long long num_groups, acc_t* products,
                                            real_t* out) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const int k = group_of(labels[index], num_groups);
    const real_t* slope = gradient + (index / num_tokens * num_groups + k) * dim;
    const acc_t weight = k < 0 ? acc_t(0) : weights[index];
    acc_t product = 0;
    for (long long d = threadIdx.x % 32 * WIDTH; d < dim; d += 32 * WIDTH) {
        acc_t g[WIDTH] = {}, x[WIDTH];
        if (k >= 0) {
            load_vector(g, slope + d, dim - d);
            if (products) load_vector(x, tokens + index * dim + d, dim - d);
            for (int i = 0; i < WIDTH && products; ++i) product += g[i] * x[i];
        }
        for (int i = 0; i < WIDTH; ++i) g[i] *= weight;
        store_vector(out + index * dim + d, g, dim - d);
    }
    if (products == nullptr) return;
    product = warp_reduce(product, Add());
    if (threadIdx.x % 32 == 0) products[index] = product;
}

// The gradient dm_j of the masses, which replaces the products dx_k . x_j. One warp,
// one group.
// Shapes: mass, members, weights and products (B, N), ends (B, K).
extern "C" __global__ void merge_mass_vjp(const acc_t* mass, const int* ends,
                                          const int* members, const acc_t* weights,
                                          long long batch, long long num_tokens,
                                          long long num_groups, acc_t* products) {
    const long long group_index = thread_index() / 32;  // (B, K)
    if (group_index >= batch * num_groups) return;
    const int lane = threadIdx.x % 32;
    const Members group =
        members_of(ends, members, group_index, num_tokens, num_groups);
    acc_t total = 0, mean = 0;
    for (int entry = group.start + lane; entry < group.end; entry += 32) {
        const long long j = group.sequence_start + group.tokens[entry];
        total += mass[j];
        mean += weights[j] * products[j];
    }
    total = warp_reduce(total, Add());
    mean = warp_reduce(mean, Add());
    for (int entry = group.start + lane; entry < group.end; entry += 32) {
        const long long j = group.sequence_start + group.tokens[entry];
        products[j] = total != 0 ? (products[j] - mean) / total : acc_t(0);
    }
}
