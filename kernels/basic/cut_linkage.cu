// Cuts of dendrograms: the first M merges make the groups.
//
// M = n - K for n tokens. With `max_error` instead of K, M is the largest number of
// merges that satisfies, with heights h and masses m,
//
//   sum_{r < M} h_r^2 / 2  <=  max_error sum_i m_i + 1e-12 sum_r h_r^2 / 2
//
// because a ward merge at height h adds h^2 / 2 to the squared error. The 1e-12 is
// ERROR_ROUNDING, an allowance for rounding. Both sides are divided by the largest
// mass, `peak`. As in `linkage`, a mass below LEAST_MASS (a millionth) of the largest
// is raised to that value. One thread computes one output.

// Return sum_i max(m_i / peak, LEAST_MASS) over the tokens of a sequence, where `peak`
// is the largest mass. Without masses, `peak` is 1 and the sum is the number of tokens.
__device__ double relative_mass_sum(const acc_t* mass, const bool* mask,
                                    long long sequence_start, long long num_tokens,
                                    double* peak) {
    acc_t largest = 0;
    for (long long i = sequence_start;
         i < sequence_start + num_tokens && mass != nullptr; ++i)
        if (is_token(mask, i)) largest = max(largest, mass[i]);
    *peak = largest > 0 ? largest : 1;
    double total = 0;
    for (long long i = sequence_start; i < sequence_start + num_tokens; ++i)
        if (is_token(mask, i))
            total += largest > 0 ? max(mass[i] / *peak, LEAST_MASS) : 1;
    return total;
}

// M of every sequence. A negative `max_error` means that there is no such limit: then K
// decides.
// Shapes: dendrogram (B, N - 1, 4), mass and mask (B, N), counts and out (B,).
extern "C" __global__ void count_merges(const double* dendrogram, const acc_t* mass,
                                        const bool* mask, const int* counts,
                                        long long batch, long long num_tokens,
                                        long long num_groups, double max_error,
                                        int* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const double* rows = dendrogram + b * (num_tokens - 1) * 4;  // (N - 1, 4)
    long long tokens = 0, merges = 0;
    for (long long i = 0; i < num_tokens; ++i)
        tokens += is_token(mask, b * num_tokens + i);
    if (max_error < 0) {
        merges = min(tokens - 1, tokens - count_of(counts, b, num_groups));
    } else {
        double peak, error = 0;
        const double total =
            relative_mass_sum(mass, mask, b * num_tokens, num_tokens, &peak);
        double of_all = 0;
        for (long long r = 0; r < tokens - 1; ++r)
            of_all += rows[4 * r + 2] * rows[4 * r + 2] / peak / 2;
        for (; merges < tokens - 1; ++merges) {
            const double height = rows[4 * merges + 2];
            error += height * height / peak / 2;
            // Also stop at a NaN: it is not within any limit.
            if (!(error <= max_error * total + ERROR_ROUNDING * of_all)) break;
        }
    }
    out[b] = static_cast<int>(max(merges, 0ll));
}

// Return whether an entry of a dendrogram's row is the index of this node. An entry may
// be any double, so the range is checked before the conversion.
__device__ bool is_node(double entry, long long node) {
    return 0 <= entry && entry < node + 1.0 && static_cast<long long>(entry) == node;
}

// The topmost node above each token. One pass over the merges in their order is enough:
// row r makes node N + r, and only later rows can merge that node.
// Shapes: dendrogram (B, N - 1, 4), mask and out (B, N), merges (B,).
extern "C" __global__ void dendrogram_roots(const double* dendrogram, const bool* mask,
                                            const int* merges, long long batch,
                                            long long num_tokens, int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const double* rows = dendrogram + b * (num_tokens - 1) * 4;  // (N - 1, 4)
    long long node = index % num_tokens;
    for (long long r = 0; r < merges[b]; ++r)
        if (is_node(rows[4 * r], node) || is_node(rows[4 * r + 1], node))
            node = num_tokens + r;
    out[index] = is_token(mask, index) ? static_cast<int>(node) : -1;
}
