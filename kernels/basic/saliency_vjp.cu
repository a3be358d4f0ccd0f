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
// where n_low tokens have h = low and divide the gradient of low equally, and n_high
// tokens have h = high and divide that of high.

// The extremes of every layer of every sequence: low, high, and the two sums above,
// each divided by its number of ties. One thread, one layer of one sequence.
// Shapes: gradient and mask (B, N), entropy (L, B, H, N), extremes (L, B, 4).
extern "C" __global__ void entropy_extremes(const acc_t* gradient,
                                            const real_t* entropy, const bool* mask,
                                            long long layers, long long batch,
                                            long long heads, long long num_tokens,
                                            acc_t* extremes) {
    const long long layer = thread_index();  // (L, B)
    if (layer >= layers * batch) return;
    const long long sequence_start = layer % batch * num_tokens;  // in (B, N)
    entropy += layer * heads * num_tokens;
    acc_t low = -MASKED_SCORE, high = MASKED_SCORE;
    for (long long i = 0; i < num_tokens; ++i) {
        if (!is_token(mask, sequence_start + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        low = min(low, h);
        high = max(high, h);
    }
    // The numbers of ties, n_low and n_high, and the sums.
    acc_t at_low = 0, at_high = 0, from_low = 0, from_high = 0;
    for (long long i = 0; i < num_tokens && high > low; ++i) {
        if (!is_token(mask, sequence_start + i)) continue;
        const acc_t h = head_mean(entropy, heads, num_tokens, i);
        const acc_t y = (h - low) / (high - low);
        at_low += h == low;
        at_high += h == high;
        from_low += gradient[sequence_start + i] * (1 - y);
        from_high += gradient[sequence_start + i] * y;
    }
    extremes[layer * EXTREMES] = low;
    extremes[layer * EXTREMES + 1] = high;
    extremes[layer * EXTREMES + 2] = from_low / max(at_low, acc_t(1));
    extremes[layer * EXTREMES + 3] = from_high / max(at_high, acc_t(1));
}

// The gradient of the entropies, from the extremes. One thread, one output.
// Shapes: gradient and mask (B, N), entropy and out (L, B, H, N), extremes (L, B, 4).
extern "C" __global__ void saliency_vjp(const acc_t* gradient, const real_t* entropy,
                                        const bool* mask, const acc_t* extremes,
                                        long long layers, long long batch,
                                        long long heads, long long num_tokens,
                                        long long high_is_salient, real_t* out) {
    const long long index = thread_index();  // (L, B, H, N)
    if (index >= layers * batch * heads * num_tokens) return;
    // `layer` is an index in (L, B), and i is the position of the token in its
    // sequence.
    const long long layer = index / num_tokens / heads, i = index % num_tokens;
    const long long token = layer % batch * num_tokens + i;
    const acc_t* extreme = extremes + layer * EXTREMES;
    const acc_t width = extreme[1] - extreme[0];
    acc_t slope = 0;
    if (is_token(mask, token) && width > 0) {
        const acc_t h =
            head_mean(entropy + layer * heads * num_tokens, heads, num_tokens, i);
        slope = gradient[token];
        if (h == extreme[0]) slope -= extreme[2];
        if (h == extreme[1]) slope -= extreme[3];
        // s = 1 - (1/L) sum_l y; with `high_is_salient`, s = (1/L) sum_l y. h is a
        // mean over the heads.
        slope /= width * (high_is_salient ? layers : -layers) * heads;
    }
    store(out + index, slope);
}
