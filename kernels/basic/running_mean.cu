// Running means, the input of the MLP prior.
//
//   c_t = mean of x_1 .. x_t                         reversed: of x_t .. x_K
//
// In both directions, row t of every array belongs to token t.

// Return the row that is read t-th. Rows past the last token keep their positions.
__device__ long long row_read_at(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// One thread goes through one column in the order of reading. The thread keeps the sum,
// so each mean needs only one more term. Padding has mean 0.
// Shapes: merged and out (B, K, D), counts (B,).
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = count_of(counts, b, num_groups);
    const long long column_start = b * num_groups * dim + d;  // in (B, K, D)

    acc_t sum = 0;
    for (long long t = 0; t < num_groups; ++t) {
        const long long element = column_start + row_read_at(t, count, reversed) * dim;
        if (t < count) sum += widen(merged[element]);
        out[element] = t < count ? sum / acc_t(t + 1) : 0;
    }
}
