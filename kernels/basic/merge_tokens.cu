// Merging: each group of tokens becomes one token, their weighted mean.
//
//   merged_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j
//
// One thread, one output. A thread adds the members of its group in index order, so
// that every run gives the same bits. Labels (B, N) are 0 .. K-1, or -1 for padding.
//
// The result is the plain mean if `mass` is null, and in any group whose mass is 0.
// If a sum overflows, `scaled_mean` computes the mean again.

// Return the mean of one column `x` (N, dim) over the members of group k, from masses
// that are divided by the largest of them and by their sum. So sums exceed the largest
// |x_j| only by rounding, and the mean is limited to it.
__device__ acc_t scaled_mean(const real_t* x, const acc_t* mass, const int* labels,
                             long long num_tokens, long long dim, long long k) {
    acc_t heaviest = 0, largest = 0, total = 0, mean = 0;
    for (long long j = 0; j < num_tokens; ++j) {
        if (labels[j] != k) continue;
        heaviest = max(heaviest, mass ? mass[j] : acc_t(1));
        largest = max(largest, abs(widen(x[j * dim])));
    }
    for (long long j = 0; j < num_tokens; ++j)
        if (labels[j] == k) total += (mass ? mass[j] : acc_t(1)) / heaviest;
    for (long long j = 0; j < num_tokens; ++j)
        if (labels[j] == k)
            mean += (mass ? mass[j] : acc_t(1)) / heaviest / total * widen(x[j * dim]);
    return max(min(mean, largest), -largest);
}

// Shapes: tokens (B, N, D), mass and labels (B, N), out (B, K, D).
extern "C" __global__ void merge_tokens(const real_t* tokens, const acc_t* mass,
                                        const int* labels, long long batch,
                                        long long num_tokens, long long dim,
                                        long long num_groups, real_t* out) {
    const long long index = thread_index();  // (B, K, D)
    if (index >= batch * num_groups * dim) return;
    const long long d = index % dim;
    const long long k = index / dim % num_groups;
    const long long sequence_start =
        index / dim / num_groups * num_tokens;  // in (B, N)

    acc_t plain = 0, size = 0, weighted = 0, total = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens; ++j) {
        if (labels[j] != k) continue;
        const acc_t x = widen(tokens[j * dim + d]);
        plain += x;
        size += 1;
        if (mass != nullptr) {
            weighted += mass[j] * x;
            total += mass[j];
        }
    }
    // An empty group is zero; a sequence with fewer than K groups has such groups.
    const acc_t sum = total != 0 ? weighted : plain;
    acc_t mean = sum / (total != 0 ? total : max(size, acc_t(1)));
    if (!is_finite(sum) || !is_finite(total))
        mean =
            scaled_mean(tokens + sequence_start * dim + d, total != 0 ? mass : nullptr,
                        labels + sequence_start, num_tokens, dim, k);
    store(out + index, mean);
}
