// Attention entropy of given probabilities; see basic/attention_entropy.cu.

// One warp, one row.
extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index() / 32;  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long first = row / num_tokens / heads % batch * num_tokens;
    const real_t* probabilities = attention + row * num_tokens;  // (N,)
    constexpr acc_t tiny = sizeof(acc_t) == 8 ? 0x1p-1022 : 0x1p-126;
    acc_t sum = 0, logs = 0;  // of p and of p log2 p
    const auto add = [&](const Vector& v, long long j) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            acc_t p = max(widen(v.element[i]), acc_t(0));
            // Behind the end p is 0, and there is no mask.
            if (mask && p > 0 && !mask[first + j + i]) p = 0;
            sum += p;
            logs += p * near_log2(max(p, tiny));
        }
    };
    const long long lane = threadIdx.x % 32 * WIDTH;
    if (grain_of(probabilities, num_tokens) == 16) {
#pragma unroll 4
        for (long long j = lane; j < num_tokens; j += 32 * WIDTH)
            add(read_pieces<uint4>(probabilities + j, num_tokens - j), j);
    } else {
        for (long long j = lane; j < num_tokens; j += 32 * WIDTH)
            add(read_vector(probabilities + j, num_tokens - j), j);
    }
    sum = warp_reduce(sum, Add());
    logs = warp_reduce(logs, Add());
    if (threadIdx.x % 32 != 0) return;
    const bool seen = sum > 0 && is_token(mask, first + row % num_tokens);
    const acc_t mean = logs / sum * acc_t(LN_2);
    out[row] = seen ? max(log(sum) - mean, acc_t(0)) : 0;
}
