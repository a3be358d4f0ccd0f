// Merging with the member lists of groups.cu (`Members` and `add_members` are in
// members.cuh). A thread goes through the members of its group only, not through all
// labels: once, or twice if their masses sum to 0. The sums add the same terms in the
// same order as basic/merge_tokens.cu.

// Return the mean of one column over the members start .. end - 1 of a group, if a sum
// overflows; see basic/merge_tokens.cu. It is not inlined, because it is rarely called.
__device__ __noinline__ acc_t scaled_mean(const real_t* column, const acc_t* mass,
                                          const int* members, int start, int end,
                                          long long sequence_start, long long dim) {
    const real_t* x = column + sequence_start * dim;
    if (mass) mass += sequence_start;
    acc_t heaviest = 0, largest = 0, total = 0, mean = 0;
    for (int entry = start; entry < end; ++entry) {
        const int j = members[entry];
        heaviest = max(heaviest, mass ? mass[j] : acc_t(1));
        largest = max(largest, abs(widen(x[j * dim])));
    }
    for (int entry = start; entry < end; ++entry)
        total += (mass ? mass[members[entry]] : acc_t(1)) / heaviest;
    for (int entry = start; entry < end; ++entry) {
        const int j = members[entry];
        mean += (mass ? mass[j] : acc_t(1)) / heaviest / total * widen(x[j * dim]);
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
        mass = nullptr;
        for (int i = 0; i < WIDTH; ++i) sum[i] = 0;
        total = add_members(tokens + d, nullptr, group, dim, dim - d, sum);
    }
    const bool none = group.start == group.end;  // an empty group is zero
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const bool overflow = !is_finite(sum[i]) || !is_finite(total);
        sum[i] = none ? acc_t(0) : sum[i] / total;
        if (overflow && d + i < dim)
            sum[i] = scaled_mean(tokens + d + i, mass, group.tokens, group.start,
                                 group.end, group.sequence_start, dim);
    }
    store_vector(out + group_index * dim + d, sum, dim - d);
}
