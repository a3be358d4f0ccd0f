// Attention entropy: how widely each token spreads its attention.
//
//   H_i = -sum_j p_ij log p_ij             in nats, 0 log 0 = 0, over the tokens j
//
// The attention a in the input need not sum to 1. The kernel divides it by its sum:
// p_ij = a_ij / S with S = sum_j a_ij. Then
//
//   H_i = log S - (sum_j a_ij log a_ij) / S
//
// One thread, one output. Arrays have L layers, B sequences, H heads in each layer, and
// N tokens. `outer` = L B H is the number of all heads. They are numbered in the order
// of the axes (L, B, H): head h belongs to sequence h / heads % batch, which has one
// row of the mask.

// Shapes: attention (L, B, H, N, N), mask (B, N), out (L, B, H, N).
extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index();  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence = row / num_tokens / heads % batch;
    const long long sequence_start = sequence * num_tokens;  // in (B, N)

    acc_t sum = 0, logs = 0;
    if (is_token(mask, sequence_start + row % num_tokens)) {
        for (long long j = 0; j < num_tokens; ++j) {
            const acc_t a = widen(attention[row * num_tokens + j]);
            if (a > 0 && is_token(mask, sequence_start + j)) {
                sum += a;
                logs += a * log(a);
            }
        }
    }
    // Rounding can make the entropy slightly negative, so clamp it at 0. A row without
    // attention has entropy 0.
    out[row] = sum > 0 ? max(log(sum) - logs / sum, acc_t(0)) : 0;
}
