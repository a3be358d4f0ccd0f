// Merging by the member lists of groups.cu: a token is read once, and the sums are
// those of basic/merge_tokens.cu term by term.

// One thread, 16 bytes of one merged token.
extern "C" __global__ void merge_tokens(const real_t* tokens, const acc_t* mass,
                                        const int* ends, const int* members,
                                        long long batch, long long num_tokens,
                                        long long dim, long long num_groups,
                                        real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, K, vectors)
    if (index >= batch * num_groups * vectors) return;
    const long long d = index % vectors * WIDTH;
    const long long k = index / vectors;  // (B, K)
    const Members group = members_of(ends, members, k, num_tokens, num_groups);

    acc_t sum[WIDTH] = {};
    acc_t total = add_members(tokens + d, mass, group, dim, dim - d, sum);
    if (total == 0) {  // no mass: the plain mean, and zero for a group of nothing
        for (int i = 0; i < WIDTH; ++i) sum[i] = 0;
        total = add_members(tokens + d, nullptr, group, dim, dim - d, sum);
    }
    const bool none = group.begin == group.end;
    for (int i = 0; i < WIDTH; ++i) sum[i] = none ? acc_t(0) : sum[i] / total;
    store_vector(out + k * dim + d, sum, dim - d);
}
