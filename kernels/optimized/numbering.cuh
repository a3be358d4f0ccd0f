// Labels from roots: the last step of both labels.cu and cut_linkage.cu.

// Write the labels (N,) of roots (N,) to `out`, with a whole block; see basic/labels.cu
// for what a root is. `positions` is scratch memory (2N,): the position of each root's
// group. `scratch` is shared memory for 32 counts.
//
//   1. Find the position of every group: that of its last member (or its first).
//   2. Number the tokens at which a group has its position; this is the group's label.
//   3. Every other token copies the label from the position of its group.
__device__ __forceinline__ void write_labels(const int* roots, long long num_tokens,
                                             long long first, int* positions,
                                             int* scratch, int* out) {
    // A maximum gives the last member. For the first member, mirror the positions.
    const auto mirror = [&](long long i) {
        return static_cast<int>(first ? num_tokens - 1 - i : i);
    };
    for (long long r = threadIdx.x; r < 2 * num_tokens; r += blockDim.x)
        positions[r] = -1;
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        if (root >= 0) atomicMax(positions + root, mirror(i));
    }
    __syncthreads();

    long long before = 0;  // groups with a position before these blockDim.x tokens
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const int root = i < num_tokens ? group_of(roots[i], 2 * num_tokens) : -1;
        const bool end = root >= 0 && positions[root] == mirror(i);
        int total;
        const long long rank = before + block_rank(end, scratch, &total);
        before += total;
        if (end) out[i] = static_cast<int>(rank);
    }
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        const int end = root < 0 ? -1 : mirror(positions[root]);
        if (end != i) out[i] = root < 0 ? -1 : out[end];
    }
}
