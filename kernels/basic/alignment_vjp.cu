// Gradients of AR alignment, see basic/alignment.cu; dx is that of a loss by x.
//
//   dy_t = 2 dloss (y_t - x_{t+1}) / (D (K - 1))     y = f(c);  reversed: x_{t-1}
//   dx W, dyᵀ x, sum dy                              of a layer y = x Wᵀ + b
//   dx_i = sum_{t >= i} dc_t / t - dy_{i-1}          reversed: the mirror image
//
// Row t of everything belongs to token t, whichever way the tokens are read.

// The row that is read t-th. Rows behind the last token keep their places.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// dy; a row that predicts no token has none. `gradient` is dloss of every sequence.
extern "C" __global__ void prediction_slopes(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             const acc_t* gradient, long long batch,
                                             long long num_groups, long long dim,
                                             long long reversed, acc_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long row = index / dim, b = row / num_groups, t = row % num_groups;
    const long long count = count_of(counts, b, num_groups);
    const long long target = reversed ? t - 1 : t + 1;
    acc_t slope = 0;
    if (t < count && 0 <= target && target < count) {
        const acc_t scale = 2 * gradient[b] / (acc_t(dim) * acc_t(count - 1));
        const acc_t x = widen(merged[index + (target - t) * dim]);
        slope = scale * (prediction[index] - x);
    }
    out[index] = slope;
}

// dx = dy W for weight (out, in); 0 where `input`, unless null, is no more than 0: what
// comes back through the ReLU that made it.
extern "C" __global__ void linear_vjp(const real_t* gradient, const real_t* weight,
                                      const real_t* input, long long num_rows,
                                      long long in_dim, long long out_dim,
                                      real_t* out) {
    const long long index = thread_index();  // (rows, in)
    if (index >= num_rows * in_dim) return;
    const real_t* dy = gradient + index / in_dim * out_dim;  // (out,)
    const real_t* w = weight + index % in_dim;               // a column
    acc_t sum = 0;
    for (long long o = 0; o < out_dim; ++o) sum += widen(dy[o]) * widen(w[o * in_dim]);
    store(out + index, input && !(widen(input[index]) > 0) ? acc_t(0) : sum);
}

// dW = dyᵀ x.
extern "C" __global__ void weight_vjp(const real_t* gradient, const real_t* input,
                                      long long num_rows, long long in_dim,
                                      long long out_dim, real_t* out) {
    const long long index = thread_index();  // (out, in)
    if (index >= out_dim * in_dim) return;
    const real_t* dy = gradient + index / in_dim;  // a column
    const real_t* x = input + index % in_dim;      // a column
    acc_t sum = 0;
    for (long long r = 0; r < num_rows; ++r)
        sum += widen(dy[r * out_dim]) * widen(x[r * in_dim]);
    store(out + index, sum);
}

// db = sum dy.
extern "C" __global__ void bias_vjp(const real_t* gradient, long long num_rows,
                                    long long out_dim, real_t* out) {
    const long long index = thread_index();  // (out,)
    if (index >= out_dim) return;
    acc_t sum = 0;
    for (long long r = 0; r < num_rows; ++r)
        sum += widen(gradient[r * out_dim + index]);
    store(out + index, sum);
}

// What comes back through the running means. One thread walks one column, the last row
// that is read first, so that every sum is the one before and one term more.
extern "C" __global__ void prefix_means_vjp(const acc_t* gradient, const int* counts,
                                            long long batch, long long num_groups,
                                            long long dim, long long reversed,
                                            acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = count_of(counts, b, num_groups);
    const long long column = b * num_groups * dim + d;  // of (B, K, D)

    acc_t sum = 0;
    for (long long t = num_groups - 1; t >= 0; --t) {
        const long long row = column + reading(t, count, reversed) * dim;
        if (t < count) sum += gradient[row] / acc_t(t + 1);
        out[row] = t < count ? sum : 0;
    }
}

// A token is part of means, read either way, and the target of its two neighbours.
extern "C" __global__ void alignment_loss_vjp(const acc_t* ahead, const acc_t* behind,
                                              const acc_t* slopes_ahead,
                                              const acc_t* slopes_behind,
                                              long long batch, long long num_groups,
                                              long long dim, real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long t = index / dim % num_groups;
    acc_t sum = ahead[index] + behind[index];
    if (t > 0) sum -= slopes_ahead[index - dim];
    if (t < num_groups - 1) sum -= slopes_behind[index + dim];
    store(out + index, sum);
}
