// Gradients of running means, see basic/running_mean.cu.
//
//   dx_i = sum_{t >= i} dc_t / t                     reversed: the mirror image
//
// Row t of everything belongs to token t, whichever way the tokens are read.

// The row that is read t-th. Rows behind the last token keep their places.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// What comes back through the running means. One thread walks one column, the last row
// that is read first, so that every sum is the one before and one term more.
extern "C" __global__ void prefix_means_vjp(const acc_t* gradient, const int* counts,
                                            long long batch, long long num_groups,
                                            long long dim, long long reversed,
                                            acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = count_of(counts, b, num_groups);
    const long long column = b * num_groups * dim + d;  // of (B, K, D)

    acc_t sum = 0;
    for (long long t = num_groups - 1; t >= 0; --t) {
        const long long row = column + reading(t, count, reversed) * dim;
        if (t < count) sum += gradient[row] / acc_t(t + 1);
        out[row] = t < count ? sum : 0;
    }
}
