// Groups: their sizes, their positions, and their members in a sorted list.
//
// `sort_members` is a stable counting sort of the tokens by label: the members of each
// group lie next to each other, in index order. Kernels that go through the members of
// a group use this list (members.cuh) instead of searching all labels.

constexpr int LABELS = 8;  // labels that a thread loads at once

// Sort the members of one sequence, with a whole block. The tokens are divided into
// `runs` runs, and one warp works on each. `counts` (runs, K) and `starts` (K,) are in
// shared or in global memory.
//
//   1. Each warp counts the members of every group in its run.
//   2. Prefix sums give the slot where each group starts, and within a group the slot
//      where each run starts.
//   3. Each warp goes through its run again, in order, and writes its tokens to their
//      slots.
//
// The slot of a token depends only on the labels, never on the order in which warps
// run.
__device__ __forceinline__ void sort_sequence(const int* label, long long num_tokens,
                                              long long num_groups, int runs,
                                              int* counts, int* starts, int* end,
                                              int* member) {
    __shared__ int scratch[32];
    const int thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread % 32, warp = thread / 32;
    const long long steps = (num_tokens + 31) / 32;  // of 32 tokens
    const long long run = (steps + runs - 1) / runs * 32;
    const long long first = min(warp * run, num_tokens);  // N for a warp without a run
    const long long last = min(first + run, num_tokens);
    int* count = counts + warp * num_groups;  // (K,), this warp's

#pragma unroll 4
    for (long long k = thread; k < runs * num_groups; k += threads) counts[k] = 0;
    __syncthreads();
    for (long long j0 = first + lane; j0 < last; j0 += 32 * LABELS) {
        int next[LABELS];
#pragma unroll
        for (int i = 0; i < LABELS; ++i)
            next[i] = j0 + 32 * i < last ? label[j0 + 32 * i] : -1;
#pragma unroll
        for (int i = 0; i < LABELS; ++i) {
            const int k = group_of(next[i], num_groups);
            if (k >= 0) atomicAdd(count + k, 1);
        }
    }
    __syncthreads();

    // From counts to slots: each count becomes the number of members of its group in
    // the runs before it, and a prefix sum of the sizes gives where each group starts.
    int before = 0;  // members of all groups before these blockDim.x groups
    for (long long k0 = 0; k0 < num_groups; k0 += threads) {
        const long long k = k0 + thread;
        int size = 0;
#pragma unroll 4
        for (int r = 0; r < runs && k < num_groups; ++r) {
            const int own = counts[r * num_groups + k];
            counts[r * num_groups + k] = size;
            size += own;
        }
        int total;
        const int start = before + block_sum_before(size, scratch, &total);
        before += total;
        if (k >= num_groups) continue;
        starts[k] = start;
        end[k] = start + size;
    }
    __syncthreads();

    // Write the members, 32 tokens at a time. The lanes of the same group take
    // consecutive slots in the order of their lanes; the last of them adds their number
    // to the count for the next 32 tokens.
    int next = first + lane < last ? label[first + lane] : -1;
    for (long long j0 = first; j0 < last; j0 += 32) {
        const long long j = j0 + lane;
        const int k = group_of(next, num_groups);
        next = j + 32 < last ? label[j + 32] : -1;
        const unsigned same = __match_any_sync(~0u, k);
        const int slot = k < 0 ? 0 : count[k] + __popc(same & ((1u << lane) - 1));
        __syncwarp();  // every lane has read the count
        if (k >= 0) {
            member[starts[k] + slot] = static_cast<int>(j);
            if (same >> lane == 1) count[k] = slot + 1;
        }
        __syncwarp();
    }
}

// One block, one sequence. `members` (B, N) lists the tokens of group 0, of group 1,
// and so on. ends[k] (B, K) is the index past the last member of group k, where group
// k + 1 starts. `counts` (B, runs + 1, K) is null if shared memory has room for the
// counts of a sequence.
extern "C" __global__ void __launch_bounds__(SORT_THREADS, 1)
    sort_members(const int* labels, long long batch, long long num_tokens,
                 long long num_groups, long long runs, int* counts, int* ends,
                 int* members) {
    const int* label = labels + blockIdx.x * num_tokens;  // (N,)
    int* end = ends + blockIdx.x * num_groups;            // (K,)
    int* member = members + blockIdx.x * num_tokens;      // (N,)
    const int count = static_cast<int>(runs);
    if (counts == nullptr) {
        int* shared = reinterpret_cast<int*>(dynamic_shared());
        sort_sequence(label, num_tokens, num_groups, count, shared,
                      shared + runs * num_groups, end, member);
    } else {
        int* own = counts + blockIdx.x * (runs + 1) * num_groups;
        sort_sequence(label, num_tokens, num_groups, count, own,
                      own + runs * num_groups, end, member);
    }
}

// One block, one sequence. Integer atomics are exact in any order.
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

// One block, one sequence. A maximum over the members gives the last one.
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
