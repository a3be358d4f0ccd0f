// Labels from roots, which labels.cu and cut_linkage.cu both end with; by a block.

// out (N,) = the labels of roots (N,). `places` is scratch (2N,), `scratch` is shared
// memory for 32 counts.
__device__ __forceinline__ void number(const int* roots, long long num_tokens,
                                       long long first, int* places, int* scratch,
                                       int* out) {
    // A maximum finds the last member; mirrored places, and it finds the first.
    const auto mirror = [&](long long i) {
        return static_cast<int>(first ? num_tokens - 1 - i : i);
    };
    for (long long r = threadIdx.x; r < 2 * num_tokens; r += blockDim.x) places[r] = -1;
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        if (root >= 0) atomicMax(places + root, mirror(i));
    }
    __syncthreads();

    long long before = 0;  // groups that stand before these blockDim.x tokens
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const int root = i < num_tokens ? group_of(roots[i], 2 * num_tokens) : -1;
        const bool end = root >= 0 && places[root] == mirror(i);
        int found;
        const long long rank = before + block_rank(end, scratch, &found);
        before += found;
        if (end) out[i] = static_cast<int>(rank);
    }
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        const int end = root < 0 ? -1 : mirror(places[root]);
        if (end != i) out[i] = root < 0 ? -1 : out[end];
    }
}
