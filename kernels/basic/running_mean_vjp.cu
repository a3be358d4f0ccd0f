// Gradients of running means, see basic/running_mean.cu.
//
//   dx_i = sum_{t >= i} dc_t / t                     reversed: the mirror image
//
// Token i is a term of all means from c_i on, with the weight 1 / t in c_t. In both
// directions, row t of every array belongs to token t.

// Return the row that is read t-th. Rows past the last token keep their positions.
__device__ long long row_read_at(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// The gradient through the running means. One thread goes through one column against
// the order of reading. The thread keeps the sum, so each gradient needs only one more
// term.
// Shapes: gradient and out (B, K, D), counts (B,).
extern "C" __global__ void prefix_means_vjp(const acc_t* gradient, const int* counts,
                                            long long batch, long long num_groups,
                                            long long dim, long long reversed,
                                            acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = count_of(counts, b, num_groups);
    const long long column_start = b * num_groups * dim + d;  // in (B, K, D)

    acc_t sum = 0;
    for (long long t = num_groups - 1; t >= 0; --t) {
        const long long element = column_start + row_read_at(t, count, reversed) * dim;
        if (t < count) sum += gradient[element] / acc_t(t + 1);
        out[element] = t < count ? sum : 0;
    }
}
