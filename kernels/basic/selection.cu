// Selection: Gumbel noise, the softmax over it, and the K tokens that stand highest.
//
//   g = -log(-log u)                       u from Philox4x32-10, see common.cuh
//   z_i = s_i + g_i                        the perturbed scores; of padding -infinity
//   pi_i = e^((z_i - m) / tau) / sum_j e^((z_j - m) / tau)
//   mass_i = pi_i s_i + (1 - pi_i) epsilon
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

extern "C" __global__ void saliency_mass(const real_t* saliency,
                                         const acc_t* probabilities, long long count,
                                         double epsilon, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= count) return;
    const acc_t p = probabilities[index];
    out[index] = p * widen(saliency[index]) + (1 - p) * acc_t(epsilon);
}

// True for the K highest scores of a sequence: those that fewer than K others beat,
// where of two equal ones the lower index wins.
extern "C" __global__ void top_tokens(const acc_t* scores, const int* counts,
                                      long long batch, long long num_tokens,
                                      long long num_groups, bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const acc_t* row = scores + b * num_tokens;  // (N,)
    const bits_t own = ordered_bits(row[i]);
    long long better = 0;
    for (long long j = 0; j < num_tokens; ++j) {
        const bits_t other = ordered_bits(row[j]);
        better += other > own || (other == own && j < i);
    }
    out[index] = row[i] != padding() && better < count_of(counts, b, num_groups);
}

// The positions of the selected tokens, ascending; -1 where there are fewer than K.
extern "C" __global__ void select_tokens(const bool* selected, long long batch,
                                         long long num_tokens, long long num_groups,
                                         int* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const bool* row = selected + index / num_groups * num_tokens;  // (N,)
    long long left = index % num_groups;  // selected tokens still to pass by
    int position = -1;
    for (long long i = 0; i < num_tokens && position < 0; ++i)
        if (row[i] && left-- == 0) position = static_cast<int>(i);
    out[index] = position;
}
