// Saliency: the importance of each token, from the entropy of its attention.
//
//   s_i = 1 - mean_l normalize(H_i^(l))    normalize(h) = (h - low) / (high - low)
//
// H_i^(l) is the mean over the heads of layer l (`head_mean` in head_mean.cuh); low and
// high are its least and greatest value over the tokens of the sequence.
// `high_is_salient` leaves out the `1 -`. One thread, one output.

// low and high of every layer of every sequence, over the tokens that are not padding.
// Shapes: entropy (L, B, H, N), mask (B, N), lowest and highest (L, B).
extern "C" __global__ void entropy_range(const real_t* entropy, const bool* mask,
                                         long long layers, long long batch,
                                         long long heads, long long num_tokens,
                                         acc_t* lowest, acc_t* highest) {
    const long long index = thread_index();  // (L, B)
    if (index >= layers * batch) return;
    acc_t low = -MASKED_SCORE, high = MASKED_SCORE;
    for (long long i = 0; i < num_tokens; ++i) {
        if (!is_token(mask, index % batch * num_tokens + i)) continue;
        const acc_t h =
            head_mean(entropy + index * heads * num_tokens, heads, num_tokens, i);
        low = min(low, h);
        high = max(high, h);
    }
    lowest[index] = low;
    highest[index] = high;
}

// The saliency of every token; 0 for padding.
// Shapes: entropy (L, B, H, N), mask and out (B, N), lowest and highest (L, B) from
// `entropy_range`.
extern "C" __global__ void saliency(const real_t* entropy, const bool* mask,
                                    const acc_t* lowest, const acc_t* highest,
                                    long long layers, long long batch, long long heads,
                                    long long num_tokens, long long high_is_salient,
                                    acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    acc_t sum = 0;
    for (long long l = 0; l < layers; ++l) {
        const long long layer = l * batch + b;  // in (L, B)
        const acc_t width = highest[layer] - lowest[layer];
        const acc_t h =
            head_mean(entropy + layer * heads * num_tokens, heads, num_tokens, i);
        if (width > 0)
            sum += (h - lowest[layer]) / width;  // a constant layer counts as 0
    }
    const acc_t mean = sum / layers;
    const acc_t salient = high_is_salient ? mean : 1 - mean;
    out[index] = is_token(mask, index) ? salient : 0;
}
