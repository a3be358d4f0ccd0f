// Vector-Jacobian product of attention entropy; see basic/attention_entropy_vjp.cu for
// the formula and the shapes.

// One warp, one row. The warp reads the row three times: for the maximum, for the sums,
// and for the gradient. The second and third reads come from the cache.
extern "C" __global__ void attention_entropy_vjp(const acc_t* gradient,
                                                 const real_t* attention,
                                                 const bool* mask, long long outer,
                                                 long long batch, long long heads,
                                                 long long num_tokens, real_t* out) {
    const long long row = thread_index() / 32;  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;
    const real_t* probabilities = attention + row * num_tokens;  // (N,)
    const long long lane_start = threadIdx.x % 32 * WIDTH;
    const bool valid = is_token(mask, sequence_start + row % num_tokens);
    const long long end = valid ? num_tokens : 0;  // all lanes have the same value
    acc_t a[WIDTH];

    // The largest entry m of the row.
    acc_t m = 0;
    for (long long j = lane_start; j < end; j += 32 * WIDTH) {
        load_vector(a, probabilities + j, num_tokens - j);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            if (a[i] > 0 && is_token(mask, sequence_start + j + i)) m = max(m, a[i]);
    }
    m = warp_reduce(m, Greatest());

    // The sums of u and of u log u, with u = a / m.
    acc_t sum = 0, logs = 0;
    for (long long j = lane_start; j < end; j += 32 * WIDTH) {
        load_vector(a, probabilities + j, num_tokens - j);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const acc_t u = a[i] / m;
            if (u > 0 && is_token(mask, sequence_start + j + i)) {
                sum += u;
                logs += u * log(u);
            }
        }
    }
    sum = warp_reduce(sum, Add());
    const acc_t mean = warp_reduce(logs, Add()) / sum;

    // The gradient, g (sum_k p_k log u_k - log u_j) / (m sum_k u_k).
    const acc_t weight = gradient[row] / (m * sum);
    for (long long j = lane_start; j < num_tokens; j += 32 * WIDTH) {
        load_vector(a, probabilities + j, num_tokens - j);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            // m is 0 in a padded row, of which no entry was read, and in a row without
            // attention. Past the end of the row, a is 0.
            const acc_t u = m > 0 ? a[i] / m : acc_t(0);
            const bool seen = u > 0 && is_token(mask, sequence_start + j + i);
            const acc_t slope = seen ? weight * (mean - log(u)) : acc_t(0);
            a[i] = slope == slope ? slope : acc_t(0);  // 0 instead of inf * 0
        }
        store_vector(out + row * num_tokens + j, a, num_tokens - j);
    }
}
