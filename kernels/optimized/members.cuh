// The members of a group, as `sort_members` of merging.cu puts them: those of group k
// of a sequence are `members[begin]` to `members[end - 1]`, in index order.

struct Members {
    long long first;  // token of (B, N) that the sequence begins with
    const int* of;    // (N,), the sequence's
    int begin, end;
};

// The members of group `index` of (B, K).
__device__ __forceinline__ Members members_of(const int* ends, const int* members,
                                              long long index, long long num_tokens,
                                              long long num_groups) {
    const long long first = index / num_groups * num_tokens;
    const int begin = index % num_groups ? ends[index - 1] : 0;
    return {first, members + first, begin, ends[index]};
}

// sum += the weighted members of a group in 16 bytes of columns; returns their mass.
// Without masses every member weighs 1.
__device__ __forceinline__ acc_t add_members(const real_t* columns, const acc_t* mass,
                                             const Members& group, long long dim,
                                             long long left, acc_t (&sum)[WIDTH]) {
    acc_t total = 0;
    for (int slot = group.begin; slot < group.end; ++slot) {
        const long long j = group.first + group.of[slot];
        const acc_t weight = mass ? mass[j] : acc_t(1);
        acc_t x[WIDTH];
        load_vector(x, columns + j * dim, left);
        for (int i = 0; i < WIDTH; ++i) sum[i] += weight * x[i];
        total += weight;
    }
    return total;
}
