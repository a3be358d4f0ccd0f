// The unit of Euclidean distances; basic/metrics.cu has the definition and the
// shapes. Its other kernels are elementwise, so they have no optimized version.

// One block, one sequence: each thread compares every BLOCK_THREADS-th norm.
extern "C" __global__ void largest_norms(const acc_t* norms, long long batch,
                                         long long num_tokens, acc_t* out) {
    __shared__ acc_t scratch[32];
    norms += blockIdx.x * num_tokens;
    out += blockIdx.x * num_tokens;
    acc_t largest = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x)
        largest = max(largest, norms[i]);
    largest = block_reduce(largest, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x)
        out[i] = largest > 0 ? largest : acc_t(1);
}
