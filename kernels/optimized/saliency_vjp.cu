// Vector-Jacobian product of saliency; see basic/saliency_vjp.cu for the formulas and
// the shapes. Only the extremes have a kernel here. The step after them is elementwise
// and would gain nothing, so the basic kernel runs.

// The extremes of a layer and, for each of them, the part of its gradient that every
// tied token receives. One block, one layer of one sequence.
extern "C" __global__ void entropy_extremes(const acc_t* gradient,
                                            const real_t* entropy, const bool* mask,
                                            long long layers, long long batch,
                                            long long heads, long long num_tokens,
                                            acc_t* extremes) {
    __shared__ acc_t scratch[32];
    const long long layer = blockIdx.x, sequence_start = layer % batch * num_tokens;
    const auto head_mean = [&](long long i) {
        acc_t sum = 0;
        for (long long h = 0; h < heads; ++h)
            sum += widen(entropy[(layer * heads + h) * num_tokens + i]);
        return sum / heads;
    };
    // First pass: the range.
    acc_t low = -MASKED_SCORE, high = MASKED_SCORE;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        if (!is_token(mask, sequence_start + i)) continue;
        const acc_t h = head_mean(i);
        low = min(low, h);
        high = max(high, h);
    }
    low = block_reduce(low, scratch, Least());
    high = block_reduce(high, scratch, Greatest());

    // Second pass: the number of tokens at each extreme, and the gradient of that
    // extreme.
    acc_t at_low = 0, at_high = 0, from_low = 0, from_high = 0;
    for (long long i = threadIdx.x; i < num_tokens && high > low; i += blockDim.x) {
        if (!is_token(mask, sequence_start + i)) continue;
        const acc_t h = head_mean(i), y = (h - low) / (high - low);
        at_low += h == low;
        at_high += h == high;
        from_low += gradient[sequence_start + i] * (1 - y);
        from_high += gradient[sequence_start + i] * y;
    }
    at_low = block_reduce(at_low, scratch, Add());
    at_high = block_reduce(at_high, scratch, Add());
    from_low = block_reduce(from_low, scratch, Add());
    from_high = block_reduce(from_high, scratch, Add());
    if (threadIdx.x != 0) return;
    extremes[layer * EXTREMES] = low;
    extremes[layer * EXTREMES + 1] = high;
    extremes[layer * EXTREMES + 2] = from_low / max(at_low, acc_t(1));
    extremes[layer * EXTREMES + 3] = from_high / max(at_high, acc_t(1));
}
