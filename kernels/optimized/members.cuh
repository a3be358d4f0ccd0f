// The members of a group, from the list that `sort_members` in groups.cu makes. The
// members of a group are tokens[start] to tokens[end - 1], in index order. Sums over
// them have a fixed order, so every run gives the same bits.

struct Members {
    long long first;    // index in (B, N) of the sequence's first token
    const int* tokens;  // (N,), sorted by group
    int start, end;
};

// Return the members of group `index` of (B, K).
__device__ __forceinline__ Members members_of(const int* ends, const int* members,
                                              long long index, long long num_tokens,
                                              long long num_groups) {
    const long long first = index / num_groups * num_tokens;
    const int start = index % num_groups ? ends[index - 1] : 0;
    return {first, members + first, start, ends[index]};
}

constexpr int MEMBERS = 4;  // members that a thread loads at once

// Call visit(x, weight) for every member of a group, in index order. x holds 16 bytes
// of the member's row, from `columns` on. Without `mass`, every weight is 1.
template <class Visit>
__device__ __forceinline__ void visit_members(const real_t* columns, const acc_t* mass,
                                              const Members& group, long long dim,
                                              long long left, Visit visit) {
    acc_t x[WIDTH];
    const real_t* rows = columns + group.first * dim;
    const acc_t* masses = mass ? mass + group.first : nullptr;
    // Unless the vectors of all rows are whole and aligned, read one member at a time.
    if (dim % WIDTH != 0 || !is_whole(columns, WIDTH)) {
        for (int slot = group.start; slot < group.end; ++slot) {
            const int j = group.tokens[slot];
            load_vector(x, rows + j * dim, left);
            visit(x, masses ? masses[j] : acc_t(1));
        }
        return;
    }
    for (int start = group.start; start < group.end; start += MEMBERS) {
        union {
            uint4 bytes;  // with elements, the compiler would wait for each vector
            Vector vector;
        } rows_of[MEMBERS];
        acc_t weights[MEMBERS];
        int members[MEMBERS];
        // Issue all loads first, so that none waits for the sums or for another row.
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m)
            members[m] = group.tokens[min(start + m, group.end - 1)];
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            const real_t* row = rows + members[m] * dim;
            weights[m] = masses ? masses[members[m]] : acc_t(1);
            rows_of[m].bytes = {};
            if (start + m < group.end)
                rows_of[m].bytes = *reinterpret_cast<const uint4*>(row);
        }
#pragma unroll
        for (int m = 0; m < MEMBERS; ++m) {
            if (start + m >= group.end) break;
            for (int i = 0; i < WIDTH; ++i) x[i] = widen(rows_of[m].vector.element[i]);
            visit(x, weights[m]);
        }
    }
}

// sum += m_j x_j over the members of a group, for 16 bytes of columns. Return the sum
// of the masses m_j.
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
