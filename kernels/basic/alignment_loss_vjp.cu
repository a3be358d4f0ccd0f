// Gradients of AR alignment, see basic/alignment_loss.cu. Throughout, dx is the
// gradient of a loss with respect to x.
//
//   dy_t = 2 dloss (y_t - x_{t+1}) / (D (K - 1))     y = f(c);  reversed: x_{t-1}
//   dx_i = sum_{t >= i} dc_t / t - dy_{i-1}          reversed: the mirror image
//
// In both directions, row t of every array belongs to token t. There are no optimized
// versions: these kernels always run.

// dy, the gradient of the predictions; 0 for the token that predicts nothing.
// `gradient` is dloss. One thread, one output.
// Shapes: prediction, merged and out (B, K, D), counts and gradient (B,).
extern "C" __global__ void prediction_slopes(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             const acc_t* gradient, long long batch,
                                             long long num_groups, long long dim,
                                             long long reversed, acc_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long token = index / dim, b = token / num_groups, t = token % num_groups;
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

// dx, the gradient of the merged tokens. `forward` and `backward` are the gradients
// through the running means of both directions (running_mean_vjp.cu). The slopes are
// the dy of both directions. Token t is the target of token t - 1 in the forward
// direction and of token t + 1 in the backward direction, so the slopes of these two
// tokens are subtracted. One thread, one output.
// Shapes: all arrays (B, K, D).
extern "C" __global__ void alignment_loss_vjp(const acc_t* forward,
                                              const acc_t* backward,
                                              const acc_t* forward_slopes,
                                              const acc_t* backward_slopes,
                                              long long batch, long long num_groups,
                                              long long dim, real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long t = index / dim % num_groups;
    acc_t sum = forward[index] + backward[index];
    if (t > 0) sum -= forward_slopes[index - dim];
    if (t < num_groups - 1) sum -= backward_slopes[index + dim];
    store(out + index, sum);
}
