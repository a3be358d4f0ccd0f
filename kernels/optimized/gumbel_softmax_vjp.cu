// Gradient of the Gumbel softmax; see basic/gumbel_softmax_vjp.cu for the formula, the
// shapes and the reason of the second mean. One block, one sequence.

extern "C" __global__ void gumbel_softmax_vjp(const acc_t* gradient,
                                              const acc_t* probabilities,
                                              long long batch, long long num_tokens,
                                              double temperature, real_t* out) {
    __shared__ acc_t scratch[32];
    const long long sequence_start = blockIdx.x * num_tokens;  // in (B, N)
    const acc_t *p = probabilities + sequence_start, *g = gradient + sequence_start;
    acc_t mean = 0, rest = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x)
        if (p[i] > 0) mean += p[i] * g[i];
    mean = block_reduce(mean, scratch, Add());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x)
        if (p[i] > 0) rest += p[i] * (g[i] - mean);
    rest = block_reduce(rest, scratch, Add());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t slope = p[i] > 0 ? p[i] * (g[i] - mean - rest) : acc_t(0);
        store(out + sequence_start + i, static_cast<acc_t>(slope / temperature));
    }
}
