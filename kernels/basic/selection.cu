// Selection: Gumbel noise, the softmax over it, and the K tokens that stand highest.
//
//   g = -log(-log u)                       u from Philox4x32-10, see common.cuh
//   z_i = s_i + g_i                        the perturbed scores; padding is NEVER
//   pi_i = e^((z_i - m) / tau) / sum_j e^((z_j - m) / tau)
//   mass_i = pi_i s_i + (1 - pi_i) epsilon
//
// One thread, one output.

// Leading axes repeat: only (sequence, token) count, and the same pair is the same
// bits.
extern "C" __global__ void gumbel_noise(unsigned long long seed, long long count,
                                        long long sequences, long long num_tokens,
                                        float* out) {
    const long long index = thread_index();  // (..., sequence, token)
    if (index >= count) return;
    out[index] = gumbel(seed, index / num_tokens % sequences, index % num_tokens);
}

extern "C" __global__ void perturbed_scores(const real_t* saliency, const bool* mask,
                                            long long batch, long long num_tokens,
                                            long long noisy, unsigned long long seed,
                                            acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    acc_t score = widen(saliency[index]);
    if (noisy) score += gumbel(seed, index / num_tokens, index % num_tokens);
    out[index] = is_token(mask, index) ? score : NEVER;
}

// The largest score of every sequence and the sum its softmax divides by.
extern "C" __global__ void softmax_totals(const acc_t* scores, long long batch,
                                          long long num_tokens, double temperature,
                                          acc_t* highest, acc_t* total) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const acc_t* row = scores + b * num_tokens;  // (N,)
    acc_t high = NEVER, sum = 0;
    for (long long i = 0; i < num_tokens; ++i) high = max(high, row[i]);
    for (long long i = 0; i < num_tokens; ++i)
        if (row[i] != NEVER) sum += exp((row[i] - high) / acc_t(temperature));
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
    const acc_t e = exp((scores[index] - highest[b]) / acc_t(temperature));
    out[index] = scores[index] == NEVER ? 0 : e / total[b];
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
// where of two equal ones the lower index wins. `counts` is K for each sequence, or
// null.
extern "C" __global__ void top_tokens(const acc_t* scores, const int* counts,
                                      long long batch, long long num_tokens,
                                      long long num_groups, bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const acc_t* row = scores + b * num_tokens;  // (N,)
    long long better = 0;
    for (long long j = 0; j < num_tokens; ++j)
        better += row[j] > row[i] || (row[j] == row[i] && j < i);
    out[index] = row[i] != NEVER && better < (counts ? counts[b] : num_groups);
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
