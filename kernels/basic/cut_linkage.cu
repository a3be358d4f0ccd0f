// Cuts of dendrograms: the first M merges make the groups.
//
// M = n - K for n tokens. With `max_distance` instead of K, M is the number of merges
// up to the first height h > max_distance. With `max_error`, M is the largest number of
// merges that satisfies, with masses m,
//
//   sum_{r < M} h_r^2 / 2  <=  max_error sum_i m_i + 1e-12 sum_r h_r^2 / 2
//
// because a ward merge at height h adds h^2 / 2 to the squared error. The 1e-12 is
// ERROR_ROUNDING, an allowance for rounding. Both sides are divided by `peak`, the
// largest mass of the free tokens, which are neither padding nor protected. As in
// `linkage`, a mass below LEAST_MASS (a millionth) of the peak is raised to that value.
// Only free tokens merge, but the masses of protected tokens count too. One thread
// computes one output.

// Return sum_i max(m_i / peak, LEAST_MASS) over the tokens of a sequence. Without
// masses, and if all masses of free tokens are 0, `peak` is 1 and the sum is the number
// of tokens.
__device__ double relative_mass_sum(const acc_t* mass, const bool* mask,
                                    const bool* protect, long long sequence_start,
                                    long long num_tokens, double* peak) {
    const long long sequence_end = sequence_start + num_tokens;
    acc_t largest = 0;
    for (long long i = sequence_start; i < sequence_end && mass != nullptr; ++i)
        if (is_token(mask, i) && !(protect && protect[i]))
            largest = max(largest, mass[i]);
    *peak = largest > 0 ? largest : 1;
    double total = 0;
    for (long long i = sequence_start; i < sequence_end; ++i)
        if (is_token(mask, i))
            total += largest > 0 ? max(mass[i] / *peak, LEAST_MASS) : 1;
    return total;
}

// M of every sequence. A negative `max_error` or `max_distance` means that there is no
// such limit. Without limits, K decides.
// Shapes: dendrogram (B, N - 1, 4), mass, mask and protect (B, N), counts and out (B,).
extern "C" __global__ void count_merges(const double* dendrogram, const acc_t* mass,
                                        const bool* mask, const bool* protect,
                                        const int* counts, long long batch,
                                        long long num_tokens, long long num_groups,
                                        double max_error, double max_distance,
                                        int* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const double* rows = dendrogram + b * (num_tokens - 1) * 4;  // (N - 1, 4)
    long long tokens = 0, free_tokens = 0, merges = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        tokens += is_token(mask, i);
        free_tokens += is_token(mask, i) && !(protect && protect[i]);
    }
    const long long max_merges = max(free_tokens - 1, 0ll);
    if (max_error >= 0) {
        double peak, error = 0, of_all = 0;
        const double total =
            relative_mass_sum(mass, mask, protect, b * num_tokens, num_tokens, &peak);
        for (long long r = 0; r < max_merges; ++r)
            of_all += rows[4 * r + 2] * rows[4 * r + 2] / peak / 2;
        for (; merges < max_merges; ++merges) {
            const double height = rows[4 * merges + 2];
            error += height * height / peak / 2;
            // Also stop at a NaN: it is not within any limit.
            if (!(error <= max_error * total + ERROR_ROUNDING * of_all)) break;
        }
    } else if (max_distance >= 0) {
        while (merges < max_merges && rows[4 * merges + 2] <= max_distance) ++merges;
    } else {
        merges = min(max_merges, tokens - count_of(counts, b, num_groups));
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
