// Gradients of AR alignment, see basic/alignment_loss.cu; dx is that of a loss by x.
//
//   dy_t = 2 dloss (y_t - x_{t+1}) / (D (K - 1))     y = f(c);  reversed: x_{t-1}
//   dx_i = sum_{t >= i} dc_t / t - dy_{i-1}          reversed: the mirror image
//
// Row t of everything belongs to token t, whichever way the tokens are read.
// The optimized kernels stand beside these, which run by default too.

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
