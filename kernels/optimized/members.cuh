// The members of a group, as `sort_members` of groups.cu puts them: those of group k
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

constexpr int MEMBERS = 4;  // that a thread loads at once

// Calls visit(x, weight) for 16 bytes of columns of every member, in index order.
// Without masses every member weighs 1.
template <class Visit>
__device__ __forceinline__ void visit_members(const real_t* columns, const acc_t* mass,
                                              const Members& group, long long dim,
                                              long long left, Visit visit) {
    acc_t x[WIDTH];
    const real_t* rows = columns + group.first * dim;
    const acc_t* masses = mass ? mass + group.first : nullptr;
    // The vectors of all rows are whole, or those of some are not.
    if (dim % WIDTH != 0 || !is_whole(columns, WIDTH)) {
        for (int slot = group.begin; slot < group.end; ++slot) {
            const int j = group.of[slot];
            load_vector(x, rows + j * dim, left);
            visit(x, masses ? masses[j] : acc_t(1));
        }
        return;
    }
    for (int begin = group.begin; begin < group.end; begin += MEMBERS) {
        union {
            uint4 bytes;  // of elements, the compiler would wait for each vector
            Vector vector;
        } rows_of[MEMBERS];
        acc_t weights[MEMBERS];
        int members[MEMBERS];
        // All loads first: none waits for the sums, or for another member's row.
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m)
            members[m] = group.of[min(begin + m, group.end - 1)];
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            const real_t* row = rows + members[m] * dim;
            weights[m] = masses ? masses[members[m]] : acc_t(1);
            rows_of[m].bytes = {};
            if (begin + m < group.end)
                rows_of[m].bytes = *reinterpret_cast<const uint4*>(row);
        }
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            if (begin + m >= group.end) break;
            for (int i = 0; i < WIDTH; ++i) x[i] = widen(rows_of[m].vector.element[i]);
            visit(x, weights[m]);
        }
    }
}

// sum += the weighted members of a group in 16 bytes of columns; returns their mass.
__device__ __forceinline__ acc_t add_members(const real_t* columns, const acc_t* mass,
                                             const Members& group, long long dim,
                                             long long left, acc_t (&sum)[WIDTH]) {
    acc_t total = 0;
    visit_members(columns, mass, group, dim, left,
                  [&](const acc_t(&x)[WIDTH], acc_t weight) {
                      for (int i = 0; i < WIDTH; ++i) sum[i] += weight * x[i];
                      total += weight;
                  });
    return total;
}
