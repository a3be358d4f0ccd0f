// The members of a group, from the list that `sort_members` in groups.cu makes. The
// members are the entries start to end - 1 of `tokens`, in index order. Sums over the
// members have a fixed order, so every run gives the same bits.

struct Members {
    long long sequence_start;  // index in (B, N)
    const int* tokens;         // (N,), sorted by group
    int start, end;
};

// Return the members of group `index` of (B, K); `ends` is (B, K), and `members` is
// (B, N).
__device__ __forceinline__ Members members_of(const int* ends, const int* members,
                                              long long index, long long num_tokens,
                                              long long num_groups) {
    const long long sequence_start = index / num_groups * num_tokens;
    const int start = index % num_groups ? ends[index - 1] : 0;
    return {sequence_start, members + sequence_start, start, ends[index]};
}

constexpr int MEMBERS = 4;  // members that a thread loads at once

// Call visit(x, weight) for every member of a group, in index order. x holds the WIDTH
// elements in 16 bytes of the member's row, from the same column in every row.
// `columns` is the address of this column in row 0 of the array (B, N, dim), and `left`
// is the number of elements from this column to the end of a row. Without `mass`, every
// weight is 1.
template <class Visit>
__device__ __forceinline__ void visit_members(const real_t* columns, const acc_t* mass,
                                              const Members& group, long long dim,
                                              long long left, Visit visit) {
    acc_t x[WIDTH];
    const real_t* rows = columns + group.sequence_start * dim;
    const acc_t* masses = mass ? mass + group.sequence_start : nullptr;
    // Unless the vectors of all rows are whole and aligned, read one member at a time.
    if (dim % WIDTH != 0 || !is_aligned_vector(columns, WIDTH)) {
        for (int entry = group.start; entry < group.end; ++entry) {
            const int j = group.tokens[entry];
            load_vector(x, rows + j * dim, left);
            visit(x, masses ? masses[j] : acc_t(1));
        }
        return;
    }
    for (int entry = group.start; entry < group.end; entry += MEMBERS) {
        // Load as `uint4`: with loads of elements, the compiler would wait for each
        // vector.
        union {
            uint4 bytes;
            Vector vector;
        } rows_of[MEMBERS];
        acc_t weights[MEMBERS];
        int members[MEMBERS];
        // Issue all loads first, so that no load waits for the sums or for another row.
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m)
            members[m] = group.tokens[min(entry + m, group.end - 1)];
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            const real_t* row = rows + members[m] * dim;
            weights[m] = masses ? masses[members[m]] : acc_t(1);
            rows_of[m].bytes = {};
            if (entry + m < group.end)
                rows_of[m].bytes = *reinterpret_cast<const uint4*>(row);
        }
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            if (entry + m >= group.end) break;
            for (int i = 0; i < WIDTH; ++i) x[i] = widen(rows_of[m].vector.element[i]);
            visit(x, weights[m]);
        }
    }
}

// sum += m_j x_j over the members of a group, for the 16 bytes of `columns`. Return the
// sum of the masses m_j.
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
