// Merging by a counting sort: each group's members lie together, in index order, so
// that a token is read once and the sums are those of basic/merging.cu term by term.

// One block, one sequence. members (B, N): the tokens of group 0, of group 1, ...;
// ends (B, K): where each group's members end, and the next one's begin.
extern "C" __global__ void sort_members(const int* labels, long long batch,
                                        long long num_tokens, long long num_groups,
                                        int* ends, int* members) {
    __shared__ int sums[1024];
    const int* label = labels + blockIdx.x * num_tokens;  // (N,)
    int* end = ends + blockIdx.x * num_groups;            // (K,)
    int* member = members + blockIdx.x * num_tokens;      // (N,)
    const int thread = threadIdx.x, threads = blockDim.x;

    for (long long k = thread; k < num_groups; k += threads) end[k] = 0;
    __syncthreads();
    for (long long j = thread; j < num_tokens; j += threads) {
        const int k = group_of(label[j], num_groups);
        if (k >= 0) atomicAdd(end + k, 1);
    }
    __syncthreads();

    // Sizes to beginnings: each thread has a run of groups, and begins where the sum of
    // all runs before it ends.
    const long long run = (num_groups + threads - 1) / threads;
    const long long first = min(thread * run, num_groups);
    const long long last = min(first + run, num_groups);
    int sum = 0;
    for (long long k = first; k < last; ++k) sum += end[k];
    sums[thread] = sum;
    __syncthreads();
    int begin = 0;
    for (int t = 0; t < thread; ++t) begin += sums[t];
    for (long long k = first; k < last; ++k) {
        const int size = end[k];
        end[k] = begin;
        begin += size;
    }
    __syncthreads();

    // One warp places the tokens, 32 at a time: lanes of one group line up by lane, and
    // the last of them moves the group's end behind itself.
    if (thread >= 32) return;
    for (long long j0 = 0; j0 < num_tokens; j0 += 32) {
        const long long j = j0 + thread;
        const int k = j < num_tokens ? group_of(label[j], num_groups) : -1;
        const unsigned same = __match_any_sync(~0u, k);
        const int slot = k < 0 ? 0 : end[k] + __popc(same & ((1u << thread) - 1));
        if (k >= 0) member[slot] = static_cast<int>(j);
        __syncwarp();
        if (k >= 0 && same >> thread == 1) end[k] = slot + 1;
        __syncwarp();
    }
}

// One thread, 16 bytes of one merged token.
extern "C" __global__ void merge_tokens(const real_t* tokens, const acc_t* mass,
                                        const int* ends, const int* members,
                                        long long batch, long long num_tokens,
                                        long long dim, long long num_groups,
                                        real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, K, vectors)
    if (index >= batch * num_groups * vectors) return;
    const long long d = index % vectors * WIDTH;
    const long long k = index / vectors;  // (B, K)
    const Members group = members_of(ends, members, k, num_tokens, num_groups);

    acc_t sum[WIDTH] = {};
    acc_t total = add_members(tokens + d, mass, group, dim, dim - d, sum);
    if (total == 0) {  // no mass: the plain mean, and zero for a group of nothing
        for (int i = 0; i < WIDTH; ++i) sum[i] = 0;
        total = add_members(tokens + d, nullptr, group, dim, dim - d, sum);
    }
    const bool none = group.begin == group.end;
    for (int i = 0; i < WIDTH; ++i) sum[i] = none ? acc_t(0) : sum[i] / total;
    store_vector(out + k * dim + d, sum, dim - d);
}

// One thread, 16 bytes of one token.
extern "C" __global__ void unmerge_tokens(const real_t* merged, const int* labels,
                                          long long batch, long long num_tokens,
                                          long long dim, long long num_groups,
                                          real_t* out) {
    const long long vectors = (dim + WIDTH - 1) / WIDTH;
    const long long index = thread_index();  // (B, N, vectors)
    if (index >= batch * num_tokens * vectors) return;
    const long long token = index / vectors, d = index % vectors * WIDTH;
    const int k = group_of(labels[token], num_groups);
    const long long group = token / num_tokens * num_groups + k;
    acc_t x[WIDTH] = {};
    if (k >= 0) load_vector(x, merged + group * dim + d, dim - d);
    store_vector(out + token * dim + d, x, dim - d);
}

// One block, one sequence.
extern "C" __global__ void group_sizes(const int* labels, long long batch,
                                       long long num_tokens, long long num_groups,
                                       int* out) {
    const int* label = labels + blockIdx.x * num_tokens;  // (N,)
    int* size = out + blockIdx.x * num_groups;            // (K,)
    for (long long k = threadIdx.x; k < num_groups; k += blockDim.x) size[k] = 0;
    __syncthreads();
    for (long long j = threadIdx.x; j < num_tokens; j += blockDim.x) {
        const int k = group_of(label[j], num_groups);
        if (k >= 0) atomicAdd(size + k, 1);
    }
}

// One block, one sequence.
extern "C" __global__ void group_positions(const int* labels, long long batch,
                                           long long num_tokens, long long num_groups,
                                           int* out) {
    const int* label = labels + blockIdx.x * num_tokens;  // (N,)
    int* position = out + blockIdx.x * num_groups;        // (K,)
    for (long long k = threadIdx.x; k < num_groups; k += blockDim.x) position[k] = -1;
    __syncthreads();
    for (long long j = threadIdx.x; j < num_tokens; j += blockDim.x) {
        const int k = group_of(label[j], num_groups);
        if (k >= 0) atomicMax(position + k, static_cast<int>(j));
    }
}
