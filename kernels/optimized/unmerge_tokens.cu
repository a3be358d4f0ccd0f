// Unmerging; see basic/unmerge_tokens.cu for the shapes. A thread copies 16 bytes, so
// that the lanes of a warp read neighbouring addresses.

// One thread, 16 bytes of one token: copied from its group, or zeros for padding.
extern "C" __global__ void unmerge_tokens(const real_t* merged, const int* labels,
                                          long long batch, long long num_tokens,
                                          long long dim, long long num_groups,
                                          real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, N, vectors)
    if (index >= batch * num_tokens * vectors) return;
    const long long token = index / vectors, d = index % vectors * WIDTH;
    const int k = group_of(labels[token], num_groups);
    const long long group_index = token / num_tokens * num_groups + k;  // in (B, K)
    acc_t x[WIDTH] = {};
    if (k >= 0) load_vector(x, merged + group_index * dim + d, dim - d);
    store_vector(out + token * dim + d, x, dim - d);
}
