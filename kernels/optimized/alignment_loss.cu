// AR alignment; see basic/alignment_loss.cu for the formulas and the shapes. A warp
// computes the error of a prediction, and a block computes the loss of a sequence.

// One warp, one prediction: the lanes read neighbouring elements of the row, and
// `warp_reduce` adds the sums of the lanes in a fixed order.
extern "C" __global__ void prediction_errors(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             long long batch, long long num_groups,
                                             long long dim, long long reversed,
                                             acc_t* out) {
    const long long index = thread_index() / 32;  // (B, K)
    if (index >= batch * num_groups) return;
    const long long b = index / num_groups, t = index % num_groups;
    const long long count = count_of(counts, b, num_groups);

    acc_t squares = 0;
    const long long target = reversed ? t - 1 : t + 1;
    if (t < count && 0 <= target && target < count) {
        const real_t* x = merged + (b * num_groups + target) * dim;  // (D,)
        for (long long d = threadIdx.x % 32; d < dim; d += 32) {
            const acc_t error = prediction[index * dim + d] - widen(x[d]);
            squares += error * error;
        }
    }
    squares = warp_reduce(squares, Add());
    if (threadIdx.x % 32 == 0) out[index] = squares / dim;
}

// One block, one sequence: the mean of the errors of its K - 1 predictions.
extern "C" __global__ void alignment_loss(const acc_t* errors, const int* counts,
                                          long long batch, long long num_groups,
                                          acc_t* out) {
    __shared__ acc_t scratch[32];
    const long long b = blockIdx.x;
    const long long count = count_of(counts, b, num_groups);
    acc_t sum = 0;
    for (long long t = threadIdx.x; t < count; t += blockDim.x)
        sum += errors[b * num_groups + t];
    sum = block_reduce(sum, scratch, Add());
    if (threadIdx.x == 0) out[b] = count > 1 ? sum / acc_t(count - 1) : 0;
}
