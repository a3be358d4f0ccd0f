// Selection: noise, softmax and saliency mass in one launch; see basic/selection.cu.

// One block, one sequence. Each thread comes back to its own tokens, so `out` can hold
// the scores, then their exponentials, then the probabilities. `mass` may be null.
extern "C" __global__ void gumbel_softmax(const real_t* saliency, const bool* mask,
                                          long long batch, long long num_tokens,
                                          double temperature, long long noisy,
                                          unsigned long long seed, double epsilon,
                                          acc_t* out, acc_t* mass) {
    __shared__ acc_t scratch[32];
    const long long first = blockIdx.x * num_tokens;  // of (B, N)
    acc_t highest = NEVER;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        acc_t score = NEVER;
        if (is_token(mask, first + i)) {
            score = widen(saliency[first + i]);
            if (noisy) score += gumbel(seed, blockIdx.x, i);
        }
        out[first + i] = score;
        highest = max(highest, score);
    }
    highest = block_reduce(highest, scratch, Greatest());

    acc_t total = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t score = out[first + i];
        const bool token = score != NEVER;
        const acc_t e = token ? exp((score - highest) / acc_t(temperature)) : acc_t(0);
        out[first + i] = e;
        total += e;
    }
    total = block_reduce(total, scratch, Add());

    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t e = out[first + i];
        const acc_t p = e > 0 ? e / total : acc_t(0);
        out[first + i] = p;
        if (mass)
            mass[first + i] = p * widen(saliency[first + i]) + (1 - p) * acc_t(epsilon);
    }
}
