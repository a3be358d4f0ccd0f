// Gradient of the Gumbel softmax, see basic/gumbel_softmax.cu. Here dx is the gradient
// of a loss with respect to x.
//
//   ds_i = pi_i (dpi_i - sum_j pi_j dpi_j) / tau
//
// One thread, one output. The gradient of padding is not read, because it may hold NaN;
// its probability is 0.
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
    // Subtract the mean a second time, from the differences. If one token has nearly
    // all of the probability, dpi_i - mean of this token is tiny, and the rounding
    // error of `mean` would dominate. `rest` corrects that error.
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j)
        if (p[j] > 0) rest += p[j] * (gradient[j] - mean);
    const acc_t slope = p[index] > 0 ? p[index] * (gradient[index] - mean - rest) : 0;
    store(out + index, static_cast<acc_t>(slope / temperature));
}
