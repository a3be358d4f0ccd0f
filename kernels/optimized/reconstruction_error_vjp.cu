// Gradients of the reconstruction error; see basic/reconstruction_error_vjp.cu for the
// formulas and the shapes.

// e and scale of a sequence. One block, one sequence.
extern "C" __global__ void error_scales(const acc_t* errors, const acc_t* squares,
                                        const acc_t* gradient, long long batch,
                                        long long num_tokens, double bound,
                                        acc_t* relative, acc_t* scales) {
    __shared__ acc_t scratch[32];
    const long long b = blockIdx.x;
    acc_t error = 0, square = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        error += errors[b * num_tokens + i];
        square += squares[b * num_tokens + i];
    }
    error = block_reduce(error, scratch, Add());
    square = block_reduce(square, scratch, Add());
    if (threadIdx.x > 0) return;
    const acc_t e = square > 0 ? error / square : acc_t(0);
    relative[b] = e;
    scales[b] = square > 0 && e > acc_t(bound) ? 2 * gradient[b] / square : acc_t(0);
}

// The gradient of the tokens. One warp, one token.
extern "C" __global__ void reconstruction_error_vjp(
    const real_t* tokens, const real_t* merged, const int* labels,
    const acc_t* relative, const acc_t* scales, long long batch, long long num_tokens,
    long long dim, long long num_groups, real_t* out) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const int k = group_of(labels[index], num_groups);
    const real_t* merged_token = merged + (b * num_groups + k) * dim;
    const acc_t e = relative[b], scale = scales[b];
    for (long long d = threadIdx.x % 32 * WIDTH; d < dim; d += 32 * WIDTH) {
        acc_t slope[WIDTH] = {}, x[WIDTH], y[WIDTH];
        if (k >= 0) {
            load_vector(x, tokens + index * dim + d, dim - d);
            load_vector(y, merged_token + d, dim - d);
            for (int i = 0; i < WIDTH; ++i) slope[i] = scale * (x[i] - y[i] - e * x[i]);
        }
        store_vector(out + index * dim + d, slope, dim - d);
    }
}

// The gradient of the merged tokens. One thread, 16 bytes of one merged token. The
// thread goes through the members of its group (members.cuh).
// Shapes: tokens (B, N, D), merged and out (B, K, D), members (B, N), ends (B, K),
// scales (B,).
extern "C" __global__ void merged_error_vjp(const real_t* tokens, const real_t* merged,
                                            const int* ends, const int* members,
                                            const acc_t* scales, long long batch,
                                            long long num_tokens, long long dim,
                                            long long num_groups, real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, K, vectors)
    if (index >= batch * num_groups * vectors) return;
    const long long d = index % vectors * WIDTH, group_index = index / vectors;
    const Members group =
        members_of(ends, members, group_index, num_tokens, num_groups);
    acc_t sum[WIDTH] = {}, y[WIDTH];
    load_vector(y, merged + group_index * dim + d, dim - d);
    visit_members(tokens + d, nullptr, group, dim, dim - d,
                  [&](const acc_t(&x)[WIDTH], acc_t) {
                      for (int i = 0; i < WIDTH; ++i) sum[i] += x[i] - y[i];
                  });
    for (int i = 0; i < WIDTH; ++i) sum[i] *= -scales[group_index / num_groups];
    store_vector(out + group_index * dim + d, sum, dim - d);
}
