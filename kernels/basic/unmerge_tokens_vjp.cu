// Gradient of unmerging, see basic/unmerge_tokens.cu. One thread, one output. Sums run
// in index order, so that every run gives the same bits.

// The gradient of a merged token is the sum of the gradients of its group's tokens.
extern "C" __global__ void unmerge_tokens_vjp(const real_t* gradient, const int* labels,
                                              long long batch, long long num_tokens,
                                              long long dim, long long num_groups,
                                              real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long d = index % dim;
    const long long k = index / dim % num_groups;
    const long long first = index / dim / num_groups * num_tokens;  // token of (B, N)
    acc_t sum = 0;
    for (long long j = first; j < first + num_tokens; ++j)
        if (labels[j] == k) sum += widen(gradient[j * dim + d]);
    store(out + index, sum);
}
