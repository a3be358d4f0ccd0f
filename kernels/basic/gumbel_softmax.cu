// Gumbel softmax: add noise to the saliency, then take a softmax.
//
//   g = -log(-log u)                       u from Philox4x32-10, see common.cuh
//   z_i = s_i + g_i                        perturbed scores; -infinity for padding
//   pi_i = e^((z_i - m) / tau) / sum_j e^((z_j - m) / tau)
//
// m is the highest perturbed score of the sequence, so no exponential overflows.
// One thread, one output.

// The perturbed scores, or the saliency itself if `noisy` is 0. The noise depends on
// the seed, the index of the sequence, and the index of the token among the tokens of
// its sequence (padding is not counted). `first_sequence` is the index of the first
// sequence of this batch, among all sequences with the same seed.
// Shapes: saliency, mask and out (B, N).
extern "C" __global__ void perturbed_scores(const real_t* saliency, const bool* mask,
                                            long long batch, long long num_tokens,
                                            long long noisy, unsigned long long seed,
                                            long long first_sequence, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    acc_t score = padding();
    if (is_token(mask, index)) {
        score = widen(saliency[index]);
        if (noisy) {
            // Use the index of the token among the tokens alone (padding is not
            // counted), so that the result is the same as without padding. Every thread
            // counts the tokens before its own.
            long long rank = mask ? 0 : i;
            if (mask)
                for (long long j = index - i; j < index; ++j) rank += mask[j];
            score += gumbel(seed, first_sequence + b, rank);
        }
    }
    out[index] = score;
}

// Return e^((z - m) / tau) of a score z, with m = `highest`, or 0 for padding. The
// division is in double: a temperature of 1e-46 would be 0 as a float, and 0 / 0 is
// NaN.
__device__ acc_t softmax_term(acc_t score, acc_t highest, double temperature) {
    if (score == padding()) return 0;
    return exp(static_cast<acc_t>((score - highest) / temperature));
}

// The highest score m of every sequence, and the sum in the denominator of its softmax.
// Shapes: scores (B, N), highest and total (B,).
extern "C" __global__ void softmax_totals(const acc_t* scores, long long batch,
                                          long long num_tokens, double temperature,
                                          acc_t* highest, acc_t* total) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const acc_t* sequence_scores = scores + b * num_tokens;  // (N,)
    acc_t high = padding(), sum = 0;
    for (long long i = 0; i < num_tokens; ++i) high = max(high, sequence_scores[i]);
    for (long long i = 0; i < num_tokens; ++i)
        sum += softmax_term(sequence_scores[i], high, temperature);
    highest[b] = high;
    total[b] = sum;
}

// The probabilities pi.
// Shapes: scores and out (B, N), highest and total (B,) from `softmax_totals`.
extern "C" __global__ void gumbel_softmax(const acc_t* scores, const acc_t* highest,
                                          const acc_t* total, long long batch,
                                          long long num_tokens, double temperature,
                                          acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const acc_t e = softmax_term(scores[index], highest[b], temperature);
    out[index] = total[b] > 0 ? e / total[b] : 0;  // 0 in a sequence without tokens
}
