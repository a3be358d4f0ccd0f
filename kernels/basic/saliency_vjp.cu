// Vector-Jacobian product of saliency, see basic/saliency.cu: from the gradient of the
// saliency to that of the entropies.
//
// The scaled entropy y = (h - low) / (high - low) depends on h itself and, through low
// and high, on the tokens that have these extremes. With the gradient g of y, a token
// has the slope
//
//   g / (high - low)
//   minus, if h = low:    sum_i g_i (1 - y_i) / n_low  / (high - low)
//   minus, if h = high:   sum_i g_i y_i / n_high  / (high - low)
//
// where n_low tokens tie at the least entropy and n_high at the greatest: they divide
// its gradient equally.

// The extremes of every layer (L, B, 4): low, high, and the two sums above, each over
// its number of ties. One thread, one layer of one sequence.
extern "C" __global__ void entropy_extremes(const acc_t* gradient,
                                            const real_t* entropy, const bool* mask,
                                            long long layers, long long batch,
                                            long long heads, long long num_tokens,
                                            acc_t* extremes) {
    const long long row = thread_index();  // (L, B)
    if (row >= layers * batch) return;
    const long long first = row % batch * num_tokens;  // of (B, N)
    entropy += row * heads * num_tokens;
    acc_t low = -MASKED_SCORE, high = MASKED_SCORE;
    for (long long i = 0; i < num_tokens; ++i) {
        if (!is_token(mask, first + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        low = min(low, h);
        high = max(high, h);
    }
    // The numbers of ties, n_low and n_high, and the sums.
    acc_t at_low = 0, at_high = 0, from_low = 0, from_high = 0;
    for (long long i = 0; i < num_tokens && high > low; ++i) {
        if (!is_token(mask, first + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        const acc_t y = (h - low) / (high - low);
        at_low += h == low;
        at_high += h == high;
        from_low += gradient[first + i] * (1 - y);
        from_high += gradient[first + i] * y;
    }
    extremes[row * EXTREMES] = low;
    extremes[row * EXTREMES + 1] = high;
    extremes[row * EXTREMES + 2] = from_low / max(at_low, acc_t(1));
    extremes[row * EXTREMES + 3] = from_high / max(at_high, acc_t(1));
}

// The gradient of the entropies, from the extremes. One thread, one output.
extern "C" __global__ void saliency_vjp(const acc_t* gradient, const real_t* entropy,
                                        const bool* mask, const acc_t* extremes,
                                        long long layers, long long batch,
                                        long long heads, long long num_tokens,
                                        long long salient_high, real_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= layers * batch * heads * num_tokens) return;
    const long long row = index / num_tokens / heads, i = index % num_tokens;  // (L, B)
    const long long token = row % batch * num_tokens + i;
    const acc_t* extreme = extremes + row * EXTREMES;
    const acc_t width = extreme[1] - extreme[0];
    acc_t slope = 0;
    if (is_token(mask, token) && width > 0) {
        const acc_t h =
            head_mean(entropy + row * heads * num_tokens, heads, num_tokens, i);
        slope = gradient[token];
        if (h == extreme[0]) slope -= extreme[2];
        if (h == extreme[1]) slope -= extreme[3];
        // s = 1 - (1/L) sum_l y, and h is a mean over the heads.
        slope /= width * (salient_high ? layers : -layers) * heads;
    }
    store(out + index, slope);
}
