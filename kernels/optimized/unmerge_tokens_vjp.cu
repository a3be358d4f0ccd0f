// Gradient of unmerging, with the member lists of members.cuh; see
// basic/unmerge_tokens_vjp.cu.

// One thread, 16 bytes of one merged token: the sum over the members of its group.
// Shapes: gradient (B, N, D), ends (B, K), members (B, N), out (B, K, D).
extern "C" __global__ void unmerge_tokens_vjp(const real_t* gradient, const int* ends,
                                              const int* members, long long batch,
                                              long long num_tokens, long long dim,
                                              long long num_groups, real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, K, vectors)
    if (index >= batch * num_groups * vectors) return;
    const long long d = index % vectors * WIDTH, group_index = index / vectors;
    const Members group =
        members_of(ends, members, group_index, num_tokens, num_groups);
    acc_t sum[WIDTH] = {};
    add_members(gradient + d, nullptr, group, dim, dim - d, sum);
    store_vector(out + group_index * dim + d, sum, dim - d);
}
