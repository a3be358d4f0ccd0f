// Running means; see basic/running_mean.cu for the formula and the shapes. The rows are
// divided into runs of `run_length` consecutive rows, in the order of reading, so that
// several warps can work on one column.

// Return the row that is read t-th. Rows past the last token keep their positions.
__device__ long long row_read_at(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// One block, 32 columns of one sequence; lane l has column l. Each warp first sums its
// run of rows. Then it goes through the run again, starting from the sum of all runs
// before it.
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    __shared__ acc_t sums[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long strips = (dim + 31) / 32;
    const long long b = blockIdx.x / strips, d = blockIdx.x % strips * 32 + lane;
    const long long count = count_of(counts, b, num_groups);
    const long long column_start = b * num_groups * dim + d;  // in (B, K, D)
    const long long run_length = (num_groups + warps - 1) / warps;
    const long long run_start = warp * run_length,
                    run_end = min(run_start + run_length, num_groups);

    acc_t sum = 0;
    for (long long t = run_start; t < min(run_end, count) && d < dim; ++t)
        sum += widen(merged[column_start + row_read_at(t, count, reversed) * dim]);
    sums[warp][lane] = sum;  // the sum of this warp's run
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warp; ++w) sum += sums[w][lane];
    for (long long t = run_start; t < run_end && d < dim; ++t) {
        const long long element = column_start + row_read_at(t, count, reversed) * dim;
        if (t < count) sum += widen(merged[element]);
        out[element] = t < count ? sum / acc_t(t + 1) : 0;
    }
}
