// Merging with the member lists of groups.cu (`Members` and `add_members` are in
// members.cuh). A thread goes through the members of its group only, not through all
// labels: once, or twice if their masses sum to 0. The sums add the same terms in the
// same order as basic/merge_tokens.cu.

// Return the mean of one column over the members of a group, if a sum overflows; see
// basic/merge_tokens.cu. It is rarely called, so it is not inlined, and it finds the
// members again: the kernel then needs no registers for them. `column` is the address
// of the column in row 0 of the array (B, N, D), and `index` is that of the group.
__device__ __noinline__ acc_t scaled_mean(const real_t* column, const acc_t* mass,
                                          const int* ends, const int* members,
                                          long long index, long long num_tokens,
                                          long long dim, long long num_groups) {
    const Members group = members_of(ends, members, index, num_tokens, num_groups);
    const real_t* x = column + group.sequence_start * dim;
    const acc_t* masses = mass ? mass + group.sequence_start : nullptr;
    acc_t heaviest = 0, largest = 0, total = 0, mean = 0;
    for (int entry = group.start; entry < group.end; ++entry) {
        const int j = group.tokens[entry];
        heaviest = max(heaviest, masses ? masses[j] : acc_t(1));
        largest = max(largest, abs(widen(x[j * dim])));
    }
    if (heaviest == 0) masses = nullptr, heaviest = 1;  // take the plain mean
    for (int entry = group.start; entry < group.end; ++entry)
        total += (masses ? masses[group.tokens[entry]] : acc_t(1)) / heaviest;
    for (int entry = group.start; entry < group.end; ++entry) {
        const int j = group.tokens[entry];
        const acc_t weight = (masses ? masses[j] : acc_t(1)) / heaviest / total;
        mean += weight * widen(x[j * dim]);
    }
    return max(min(mean, largest), -largest);
}

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
    unsigned overflows = 0;                      // a bit for each column
    for (int i = 0; i < WIDTH; ++i) {
        overflows |= unsigned(!is_finite(sum[i]) || !is_finite(total)) << i;
        sum[i] = none ? acc_t(0) : sum[i] / total;
    }
    store_vector(out + group_index * dim + d, sum, dim - d);
    for (int i = 0; overflows != 0 && i < WIDTH && d + i < dim; ++i)
        if (overflows >> i & 1)
            store(out + group_index * dim + d + i,
                  scaled_mean(tokens + d + i, mass, ends, members, group_index,
                              num_tokens, dim, num_groups));
}
