// Entropies of layers (L, B, H, N): their mean over the heads, the range of the means
// over the tokens of a layer, and min-max scaling. Each thread has THREAD_TOKENS
// tokens: first, first + step, first + 2 step, ...

// Compute the mean over the heads (H, N) of each token of a thread; 0 past the last
// token. The index of a token may be an int if rows are short: it takes half as many
// registers as a long long.
template <class Index>
__device__ __forceinline__ void head_means(const real_t* rows, long long heads,
                                           Index num_tokens, Index first, Index step,
                                           acc_t (&mean)[THREAD_TOKENS]) {
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) mean[t] = 0;
#pragma unroll 4
    for (long long h = 0; h < heads; ++h, rows += num_tokens) {
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; ++t)
            if (first + t * step < num_tokens) mean[t] += widen(rows[first + t * step]);
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
                                        const bool* mask, Index num_tokens, Index first,
                                        Index step) {
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; ++t) {
            const Index i = first + t * step;
            if (i >= num_tokens || !is_token(mask, i)) continue;
            low = min(low, mean[t]);
            high = max(high, mean[t]);
        }
    }
};

// Combine the ranges of the parts of a layer, with one warp.
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
                                             long long salient_high) {
    const acc_t normal = sum / layers;
    return salient_high ? normal : 1 - normal;
}
