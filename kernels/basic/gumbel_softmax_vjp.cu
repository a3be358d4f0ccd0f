// Gradient of the Gumbel softmax, see basic/gumbel_softmax.cu. Here dx is the gradient
// of a loss with respect to x.
//
//   ds_i = pi_i (dpi_i - sum_j pi_j dpi_j) / tau
//
// One thread, one output. Padding has probability 0. The gradient of a token with
// probability 0 is not read, because the gradient of padding may be NaN.
// Shapes: gradient, probabilities and out (B, N).
extern "C" __global__ void gumbel_softmax_vjp(const acc_t* gradient,
                                              const acc_t* probabilities,
                                              long long batch, long long num_tokens,
                                              double temperature, real_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long sequence_start = index - index % num_tokens;
    const acc_t* p = probabilities;
    acc_t mean = 0, rest = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j)
        if (p[j] > 0) mean += p[j] * gradient[j];
    // `rest` is the mean of the differences dpi_j - mean. Without rounding it would be
    // 0, so it is the error of `mean`. Subtract it too: if one token has nearly all of
    // the probability, its own difference is tiny, and the error would dominate.
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j)
        if (p[j] > 0) rest += p[j] * (gradient[j] - mean);
    const acc_t slope = p[index] > 0 ? p[index] * (gradient[index] - mean - rest) : 0;
    store(out + index, static_cast<acc_t>(slope / temperature));
}
