// Merging with the member lists of groups.cu (`Members` and `add_members` are in
// members.cuh). A thread goes through the members of its group only, not through all
// labels: once, or twice if their masses sum to 0. The sums add the same terms in the
// same order as basic/merge_tokens.cu.

// One thread, 16 bytes of one merged token.
// Shapes: tokens (B, N, D), mass and members (B, N), ends (B, K), out (B, K, D). The
// entries of group k in `members` stop before ends[k]. The numbers in both arrays count
// from the start of the sequence. `add_members` adds the offset of the sequence, so it
// gets column d of the first row of the whole array.
extern "C" __global__ void merge_tokens(const real_t* tokens, const acc_t* mass,
                                        const int* ends, const int* members,
                                        long long batch, long long num_tokens,
                                        long long dim, long long num_groups,
                                        real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, K, vectors)
    if (index >= batch * num_groups * vectors) return;
    const long long d = index % vectors * WIDTH;
    const long long group_index = index / vectors;  // (B, K)
    const Members group =
        members_of(ends, members, group_index, num_tokens, num_groups);

    acc_t sum[WIDTH] = {};
    acc_t total = add_members(tokens + d, mass, group, dim, dim - d, sum);
    if (total == 0) {  // the masses sum to 0: take the plain mean
        for (int i = 0; i < WIDTH; ++i) sum[i] = 0;
        total = add_members(tokens + d, nullptr, group, dim, dim - d, sum);
    }
    const bool none = group.start == group.end;  // an empty group is zero
    for (int i = 0; i < WIDTH; ++i) sum[i] = none ? acc_t(0) : sum[i] / total;
    store_vector(out + group_index * dim + d, sum, dim - d);
}
