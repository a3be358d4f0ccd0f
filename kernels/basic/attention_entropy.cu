// Attention entropy: how widely each token attends, from attention probabilities.
//
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//
// Given probabilities a need not sum to 1: p = a / S with S = sum_j a_ij, and so
//
//   H_i = log S - sum_j a_ij log a_ij / S
//
// One thread, one output. `outer` runs over (L, B, H), so that the sequence of an outer
// index, which its mask needs, is outer / heads % batch.

extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence = row / num_tokens / heads % batch;
    const long long first = sequence * num_tokens;  // of this sequence in the mask

    acc_t sum = 0, logs = 0;
    if (is_token(mask, first + row % num_tokens)) {
        for (long long j = 0; j < num_tokens; ++j) {
            const acc_t a = widen(attention[row * num_tokens + j]);
            if (a > 0 && is_token(mask, first + j)) {
                sum += a;
                logs += a * log(a);
            }
        }
    }
    // Rounding may leave less than nothing; a row without attention has no entropy.
    out[row] = sum > 0 ? max(log(sum) - logs / sum, acc_t(0)) : 0;
}
