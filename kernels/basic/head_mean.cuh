// Return the value of token i in one layer of one sequence: the mean over the heads of
// `values` (H, N), such as entropies.
__device__ acc_t head_mean(const real_t* values, long long heads, long long num_tokens,
                           long long i) {
    acc_t sum = 0;
    for (long long h = 0; h < heads; ++h) sum += widen(values[h * num_tokens + i]);
    return sum / heads;
}
