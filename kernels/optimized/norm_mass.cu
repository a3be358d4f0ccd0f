// Norm mass; see basic/norm_mass.cu for the formula and the shapes. A block adds the
// norms of a sequence.

// One block, one sequence: each thread adds every blockDim.x-th norm, then
// `block_reduce` adds the sums of the threads in a fixed order.
extern "C" __global__ void norm_mass(const acc_t* norms, const bool* selected,
                                     long long batch, long long num_tokens,
                                     acc_t* out) {
    __shared__ acc_t scratch[32];
    const long long sequence_start = blockIdx.x * num_tokens;
    acc_t selected_sum = 0, total = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        total += norms[sequence_start + i];
        if (selected[sequence_start + i]) selected_sum += norms[sequence_start + i];
    }
    selected_sum = block_reduce(selected_sum, scratch, Add());
    total = block_reduce(total, scratch, Add());
    if (threadIdx.x == 0) out[blockIdx.x] = total > 0 ? selected_sum / total : 1;
}
