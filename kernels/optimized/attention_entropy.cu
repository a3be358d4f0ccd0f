// Attention entropy of given probabilities; see basic/attention_entropy.cu for the
// shapes.
//
//   H_i = log S - sum_j a_ij log a_ij / S,    S = sum_j a_ij
//
// The logarithms in the sum over j are log2 (`approximate_log2` in softmax_states.cuh),
// which is one instruction for floats. This sum is converted to nats at the end; log S
// is a natural logarithm.

// One warp, one row: each lane reads 16 bytes at a time.
extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index() / 32;  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;
    const real_t* row_attention = attention + row * num_tokens;  // (N,)
    // The smallest normal number replaces a smaller a: log2 of 0 would be -infinity.
    constexpr acc_t tiny = sizeof(acc_t) == 8 ? 0x1p-1022 : 0x1p-126;
    acc_t sum = 0, logs = 0;  // sums of a and of a log2 a
    const auto add = [&](const Vector& v, long long j) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            acc_t a = max(widen(v.element[i]), acc_t(0));
            // Past the end of the row a is 0, so the mask is not read there.
            if (mask && a > 0 && !mask[sequence_start + j + i]) a = 0;
            sum += a;
            logs += a * approximate_log2(max(a, tiny));
        }
    };
    const long long lane_start = threadIdx.x % 32 * WIDTH;
    // Aligned rows are the common case. They have a loop of their own, which can be
    // unrolled.
    if (alignment_of(row_attention, num_tokens) == 16) {
#pragma unroll 4
        for (long long j = lane_start; j < num_tokens; j += 32 * WIDTH)
            add(read_pieces<uint4>(row_attention + j, num_tokens - j), j);
    } else {
        for (long long j = lane_start; j < num_tokens; j += 32 * WIDTH)
            add(read_vector(row_attention + j, num_tokens - j), j);
    }
    sum = warp_reduce(sum, Add());
    logs = warp_reduce(logs, Add());
    if (threadIdx.x % 32 != 0) return;
    const bool seen = sum > 0 && is_token(mask, sequence_start + row % num_tokens);
    const acc_t mean = logs / sum * acc_t(LN_2);  // converted from log2
    out[row] = seen ? max(log(sum) - mean, acc_t(0)) : 0;
}
