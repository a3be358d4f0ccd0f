// Return the value of token i in one layer of one sequence: the mean over the heads of
// `values` (H, N), such as entropies.
__device__ acc_t head_mean(const real_t* values, long long heads, long long num_tokens,
                           long long i) {
    acc_t sum = 0;
    for (long long h = 0; h < heads; ++h) sum += widen(values[h * num_tokens + i]);
    return sum / heads;
}

// Return the value of token i of sequence b: the mean over the layers and heads of
// `values` (L, B, H, N).
__device__ acc_t layer_mean(const real_t* values, long long layers, long long batch,
                            long long heads, long long num_tokens, long long b,
                            long long i) {
    acc_t sum = 0;
    for (long long l = 0; l < layers; ++l)
        sum += head_mean(values + (l * batch + b) * heads * num_tokens, heads,
                         num_tokens, i);
    return sum / layers;
}

// Return the number of tokens at the positions 0 .. i of a sequence, whose mask starts
// at `sequence_start`.
__device__ acc_t tokens_up_to(const bool* mask, long long sequence_start, long long i) {
    if (mask == nullptr) return acc_t(i + 1);
    long long count = 0;
    for (long long j = 0; j <= i; ++j) count += mask[sequence_start + j];
    return acc_t(count);
}
