// Gumbel softmax: noise, and the softmax over it.
//
//   g = -log(-log u)                       u from Philox4x32-10, see common.cuh
//   z_i = s_i + g_i                        the perturbed scores; of padding -infinity
//   pi_i = e^((z_i - m) / tau) / sum_j e^((z_j - m) / tau)
//
// One thread, one output.

// `first` is the number of the batch's first sequence among all that share the seed.
extern "C" __global__ void perturbed_scores(const real_t* saliency, const bool* mask,
                                            long long batch, long long num_tokens,
                                            long long noisy, unsigned long long seed,
                                            long long first, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    acc_t score = padding();
    if (is_token(mask, index)) {
        score = widen(saliency[index]);
        if (noisy) {
            // Draw n is the n-th token's, wherever padding lies: the result is that of
            // the tokens alone. A thread has nobody to ask, so it counts for itself.
            long long rank = mask ? 0 : i;
            if (mask)
                for (long long j = index - i; j < index; ++j) rank += mask[j];
            score += gumbel(seed, first + b, rank);
        }
    }
    out[index] = score;
}

// e^((z - m) / tau). The division is in double, where no temperature is too small: of
// float 1e-46 is 0, and 0 / 0 is no number.
__device__ acc_t softmax_term(acc_t score, acc_t highest, double temperature) {
    if (score == padding()) return 0;
    return exp(static_cast<acc_t>((score - highest) / temperature));
}

// The largest score of every sequence and the sum its softmax divides by.
extern "C" __global__ void softmax_totals(const acc_t* scores, long long batch,
                                          long long num_tokens, double temperature,
                                          acc_t* highest, acc_t* total) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const acc_t* row = scores + b * num_tokens;  // (N,)
    acc_t high = padding(), sum = 0;
    for (long long i = 0; i < num_tokens; ++i) high = max(high, row[i]);
    for (long long i = 0; i < num_tokens; ++i)
        sum += softmax_term(row[i], high, temperature);
    highest[b] = high;
    total[b] = sum;
}

extern "C" __global__ void gumbel_softmax(const acc_t* scores, const acc_t* highest,
                                          const acc_t* total, long long batch,
                                          long long num_tokens, double temperature,
                                          acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const acc_t e = softmax_term(scores[index], highest[b], temperature);
    out[index] = total[b] > 0 ? e / total[b] : 0;  // without tokens it is 0
}
