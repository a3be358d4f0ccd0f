// Norm mass; see basic/norm_mass.cu for the formula.

// One block, one sequence: threads add every blockDim.x-th norm, then `block_reduce`
// adds their sums in a fixed order.
extern "C" __global__ void norm_mass(const acc_t* norms, const bool* selected,
                                     long long batch, long long num_tokens,
                                     acc_t* out) {
    __shared__ acc_t scratch[32];
    const long long first = blockIdx.x * num_tokens;
    acc_t kept = 0, total = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        total += norms[first + i];
        if (selected[first + i]) kept += norms[first + i];
    }
    kept = block_reduce(kept, scratch, Add());
    total = block_reduce(total, scratch, Add());
    if (threadIdx.x == 0) out[blockIdx.x] = total > 0 ? kept / total : 1;
}
