// Entropies of layers (L, B, H, N): their mean over the heads, the range of the means
// over the tokens of a layer, and min-max scaling (the formula is in
// basic/saliency.cu). Each thread has THREAD_TOKENS tokens: first_token, first_token +
// step, first_token + 2 step, ... The tokens of a layer may be divided into parts: then
// a warp or a block finds the range of one part, and `join_parts` combines the ranges.

// Compute the mean over the heads of each token of a thread; 0 past the last token.
// `entropy` (H, N) is that of one layer of a sequence. The index of a token may be an
// int if rows are short: an int takes half as many registers as a long long.
template <class Index>
__device__ __forceinline__ void head_means(const real_t* entropy, long long heads,
                                           Index num_tokens, Index first_token,
                                           Index step, acc_t (&mean)[THREAD_TOKENS]) {
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) mean[t] = 0;
#pragma unroll 4
    for (long long h = 0; h < heads; ++h, entropy += num_tokens) {
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; ++t)
            if (first_token + t * step < num_tokens)
                mean[t] += widen(entropy[first_token + t * step]);
    }
    if (heads == 1) return;
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) mean[t] /= heads;
}

// The least and the greatest value of the tokens so far. Without tokens, high < low:
// the width is not above 0, and the layer counts as constant.
struct Range {
    acc_t low = -MASKED_SCORE, high = MASKED_SCORE;

    // Include the tokens of a thread, except padding.
    template <class Index>
    __device__ __forceinline__ void add(const acc_t (&mean)[THREAD_TOKENS],
                                        const bool* mask, Index num_tokens,
                                        Index first_token, Index step) {
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; ++t) {
            const Index i = first_token + t * step;
            if (i >= num_tokens || !is_token(mask, i)) continue;
            low = min(low, mean[t]);
            high = max(high, mean[t]);
        }
    }
};

// Combine the ranges of the parts of a layer, with one warp: from `lowest` and
// `highest` (parts,), compute `low` and `width`, the range of the layer.
__device__ __forceinline__ void join_parts(const acc_t* lowest, const acc_t* highest,
                                           long long parts, acc_t* low, acc_t* width) {
    Range range;
#pragma unroll 1  // nearly always a single iteration
    for (long long p = threadIdx.x % 32; p < parts; p += 32) {
        range.low = min(range.low, lowest[p]);
        range.high = max(range.high, highest[p]);
    }
    range.low = warp_reduce(range.low, Least());
    range.high = warp_reduce(range.high, Greatest());
    if (threadIdx.x % 32 != 0) return;
    *low = range.low;
    *width = range.high - range.low;
}

// sum += the means of a layer, scaled to 0 .. 1; a constant layer adds 0.
__device__ __forceinline__ void add_layer(const acc_t (&mean)[THREAD_TOKENS], acc_t low,
                                          acc_t width, acc_t (&sum)[THREAD_TOKENS]) {
    if (!(width > 0)) return;
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) sum[t] += (mean[t] - low) / width;
}

// Return s = 1 - (1/L) sum_l Normalize(H^(l)), or without the `1 -`.
__device__ __forceinline__ acc_t saliency_of(acc_t sum, long long layers,
                                             long long high_is_salient) {
    const acc_t mean = sum / layers;
    return high_is_salient ? mean : 1 - mean;
}
