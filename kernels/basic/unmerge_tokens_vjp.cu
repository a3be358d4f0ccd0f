// Gradient of unmerging, see basic/unmerge_tokens.cu. One thread, one output. Sums run
// in index order, so that every run gives the same bits.

// The gradient of a merged token is the sum of the gradients of its group's tokens.
// Shapes: gradient (B, N, D), labels (B, N), out (B, K, D).
extern "C" __global__ void unmerge_tokens_vjp(const real_t* gradient, const int* labels,
                                              long long batch, long long num_tokens,
                                              long long dim, long long num_groups,
                                              real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long d = index % dim;
    const long long k = index / dim % num_groups;
    const long long sequence_start =
        index / dim / num_groups * num_tokens;  // in (B, N)
    acc_t sum = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j)
        if (labels[j] == k) sum += widen(gradient[j * dim + d]);
    store(out + index, sum);
}
