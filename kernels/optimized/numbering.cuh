// Labels from roots: the only step of labels.cu and the last step of cut_linkage.cu.
// All members of a group have the same root; basic/labels.cu has the definition.

// Write the labels (N,) of roots (N,) to `out`, with a whole block. `positions` is
// scratch memory (2N,): the position of each root's group. `scratch` is shared memory
// for 32 counts.
//
//   1. Find the position of every group: that of its last member, or of its first
//      member if `by_first`.
//   2. Number the tokens at which a group has its position; the number is the label of
//      that group.
//   3. Every other token copies the label from the position of its group.
__device__ __forceinline__ void write_labels(const int* roots, long long num_tokens,
                                             long long by_first, int* positions,
                                             int* scratch, int* out) {
    // The maximum of the positions is the last member. For the first member, mirror the
    // positions.
    const auto mirror = [&](long long i) {
        return static_cast<int>(by_first ? num_tokens - 1 - i : i);
    };
    for (long long r = threadIdx.x; r < 2 * num_tokens; r += blockDim.x)
        positions[r] = -1;
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        if (root >= 0) atomicMax(positions + root, mirror(i));
    }
    __syncthreads();

    long long before = 0;  // groups with a position before token i0
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const int root = i < num_tokens ? group_of(roots[i], 2 * num_tokens) : -1;
        const bool has_position = root >= 0 && positions[root] == mirror(i);
        int total;
        const long long rank = before + block_rank(has_position, scratch, &total);
        before += total;
        if (has_position) out[i] = static_cast<int>(rank);
    }
    __syncthreads();
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const int root = group_of(roots[i], 2 * num_tokens);
        const int position = root < 0 ? -1 : mirror(positions[root]);
        if (position != i) out[i] = root < 0 ? -1 : out[position];
    }
}
