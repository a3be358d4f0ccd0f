// Running means, by runs; see basic/running_mean.cu.

// The row that is read t-th. Rows behind the last token keep their places.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// One block, 32 columns of one sequence. Each of its warps sums a run of rows, then
// walks the run again from the sum of all runs before it.
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    __shared__ acc_t sums[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long strips = (dim + 31) / 32;
    const long long b = blockIdx.x / strips, d = blockIdx.x % strips * 32 + lane;
    const long long count = count_of(counts, b, num_groups);
    const long long column = b * num_groups * dim + d;  // of (B, K, D)
    const long long run = (num_groups + warps - 1) / warps;
    const long long first = warp * run, last = min(first + run, num_groups);

    acc_t sum = 0;
    for (long long t = first; t < min(last, count) && d < dim; ++t)
        sum += widen(merged[column + reading(t, count, reversed) * dim]);
    sums[warp][lane] = sum;  // the warp's run, t being the order of reading
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warp; ++w) sum += sums[w][lane];
    for (long long t = first; t < last && d < dim; ++t) {
        const long long row = column + reading(t, count, reversed) * dim;
        if (t < count) sum += widen(merged[row]);
        out[row] = t < count ? sum / acc_t(t + 1) : 0;
    }
}
