// Cuts of dendrograms: the first M merges make the groups.
//
// M = n - K for n tokens, or the most merges for which, h being heights and m masses,
//
//   sum_{r < M} h_r^2 / 2  <=  (max_error + 1e-12) sum_i m_i
//
// One thread, one output.

// sum_i m_i over the largest mass, which is `peak`; without masses the tokens' number.
__device__ double total_mass(const acc_t* mass, const bool* mask, long long first,
                             long long num_tokens, double* peak) {
    acc_t most = 0;
    for (long long i = first; i < first + num_tokens && mass != nullptr; ++i)
        if (is_token(mask, i)) most = max(most, mass[i]);
    *peak = most > 0 ? most : 1;
    double total = 0;
    for (long long i = first; i < first + num_tokens; ++i)
        if (is_token(mask, i)) total += most > 0 ? max(mass[i] / *peak, LEAST_MASS) : 1;
    return total;
}

// M of every sequence. Without a max_error, which is then negative, K decides.
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
        const double total = total_mass(mass, mask, b * num_tokens, num_tokens, &peak);
        for (; merges < tokens - 1; ++merges) {
            const double height = rows[4 * merges + 2];
            error += height * height / peak / 2;
            if (!(error <= (max_error + ERROR_ROUNDING) * total)) break;
        }
    }
    out[b] = static_cast<int>(max(merges, 0ll));
}

// Whether a number in a dendrogram means this node.
__device__ bool is_node(double id, long long node) {
    return 0 <= id && id < node + 1.0 && static_cast<long long>(id) == node;
}

// The topmost node above each token, by the merges in their order: the group of row r
// is N + r, and no earlier row can know of it.
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
