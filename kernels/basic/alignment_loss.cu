// AR alignment: how well a prior predicts each merged token from the tokens before it.
//
//   loss = mean_t ‖f(c_t) - x_{t+1}‖² / D             reversed: x_{t-1}
//
// c_t is the input of the prior at token t: for the MLP prior, the running mean of the
// tokens read so far (basic/running_mean.cu). The forward loss reads from the first
// token on and predicts the next one; the backward loss (`reversed`) is the mirror
// image. In both directions, row t of every array belongs to token t.

// The error of every prediction, ‖f(c_t) - x_target‖² / D. The token read last predicts
// nothing; its error is 0. One thread, one prediction.
// Shapes: prediction and merged (B, K, D), counts (B,), out (B, K).
extern "C" __global__ void prediction_errors(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             long long batch, long long num_groups,
                                             long long dim, long long reversed,
                                             acc_t* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const long long b = index / num_groups, t = index % num_groups;
    const long long count = count_of(counts, b, num_groups);

    acc_t squares = 0;
    const long long target = reversed ? t - 1 : t + 1;
    if (t < count && 0 <= target && target < count) {
        const real_t* x = merged + (b * num_groups + target) * dim;  // (D,)
        for (long long d = 0; d < dim; ++d) {
            const acc_t error = prediction[index * dim + d] - widen(x[d]);
            squares += error * error;
        }
    }
    out[index] = squares / dim;
}

// The mean of the K - 1 errors of a sequence. With one token there is nothing to
// predict, and the loss is 0. One thread, one sequence.
// Shapes: errors (B, K) from `prediction_errors`, counts (B,), out (B,).
extern "C" __global__ void alignment_loss(const acc_t* errors, const int* counts,
                                          long long batch, long long num_groups,
                                          acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const long long count = count_of(counts, b, num_groups);
    acc_t sum = 0;
    for (long long t = 0; t < count; ++t) sum += errors[b * num_groups + t];
    out[b] = count > 1 ? sum / acc_t(count - 1) : 0;
}
