// Groups: the size of each group, the position of its last member, and its members in a
// sorted list.
//
// `sort_members` is a stable counting sort of the tokens by label: in the sorted list,
// the members of each group follow each other, in index order. Kernels that go through
// the members of a group use this list (members.cuh) instead of searching all labels.

constexpr int LABELS = 8;  // labels that a thread loads at once

// Sort the members of one sequence, with a whole block. The tokens are divided into
// `runs` runs of `run_length` consecutive tokens, and one warp works on each run. An
// entry is an index in the sorted list `member` (N,). The entry of a token is the entry
// where its group starts, plus the rank of the token: the number of members of its
// group before it. `run_counts` (runs, K) and `starts` (K,) are in shared or in global
// memory. `label` is (N,), and `end` is (K,).
//
//   1. Each warp counts the members of every group in its run.
//   2. Prefix sums give the entry where each group starts, and for each run the number
//      of members of the group in earlier runs.
//   3. Each warp goes through its run again, in order, and writes its tokens to their
//      entries.
//
// The entry of a token depends only on the labels, never on the order in which warps
// run.
__device__ __forceinline__ void sort_sequence(const int* label, long long num_tokens,
                                              long long num_groups, int runs,
                                              int* run_counts, int* starts, int* end,
                                              int* member) {
    __shared__ int scratch[32];
    const int thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread % 32, warp = thread / 32;
    const long long steps = (num_tokens + 31) / 32;  // a step has 32 tokens
    // Tokens of one run, a multiple of 32.
    const long long run_length = (steps + runs - 1) / runs * 32;
    // A warp without a run starts and ends at N.
    const long long run_start = min(warp * run_length, num_tokens);
    const long long run_end = min(run_start + run_length, num_tokens);
    int* warp_counts = run_counts + warp * num_groups;  // (K,)

#pragma unroll 4
    for (long long k = thread; k < runs * num_groups; k += threads) run_counts[k] = 0;
    __syncthreads();
    for (long long j0 = run_start + lane; j0 < run_end; j0 += 32 * LABELS) {
        int loaded[LABELS];
#pragma unroll
        for (int i = 0; i < LABELS; ++i)
            loaded[i] = j0 + 32 * i < run_end ? label[j0 + 32 * i] : -1;
#pragma unroll
        for (int i = 0; i < LABELS; ++i) {
            const int k = group_of(loaded[i], num_groups);
            if (k >= 0) atomicAdd(warp_counts + k, 1);
        }
    }
    __syncthreads();

    // From counts to ranks: each count becomes the number of members of its group in
    // the runs before it. A prefix sum of the group sizes gives the entry where each
    // group starts.
    int before = 0;  // members of all groups before group k0
    for (long long k0 = 0; k0 < num_groups; k0 += threads) {
        const long long k = k0 + thread;
        int size = 0;
#pragma unroll 4
        for (int r = 0; r < runs && k < num_groups; ++r) {
            const int in_run = run_counts[r * num_groups + k];
            run_counts[r * num_groups + k] = size;
            size += in_run;
        }
        int total;
        const int start = before + block_sum_before(size, scratch, &total);
        before += total;
        if (k >= num_groups) continue;
        starts[k] = start;
        end[k] = start + size;
    }
    __syncthreads();

    // Write the members, 32 tokens at a time. Lanes with the same group take
    // consecutive ranks, in the order of the lanes. The last of these lanes adds
    // their number to the count, for the next 32 tokens. The `__syncwarp` calls
    // separate the reads of the counts from the writes. No barrier of the block is
    // needed, because a warp uses only its own counts.
    int next_label = run_start + lane < run_end ? label[run_start + lane] : -1;
    for (long long j0 = run_start; j0 < run_end; j0 += 32) {
        const long long j = j0 + lane;
        const int k = group_of(next_label, num_groups);
        next_label = j + 32 < run_end ? label[j + 32] : -1;
        const unsigned same = __match_any_sync(~0u, k);
        const int rank = k < 0 ? 0 : warp_counts[k] + __popc(same & ((1u << lane) - 1));
        __syncwarp();  // every lane has read the count
        if (k >= 0) {
            member[starts[k] + rank] = static_cast<int>(j);
            if (same >> lane == 1) warp_counts[k] = rank + 1;
        }
        __syncwarp();
    }
}

// One block, one sequence. `members` (B, N) lists the tokens of group 0, of group 1,
// and so on. ends[k] (B, K) is the entry past the last member of group k, where group k
// + 1 starts. `run_counts` (B, runs + 1, K) has the counts of the runs and the starts;
// it is null if shared memory has room for these counts.
// Other shapes: labels (B, N).
extern "C" __global__ void __launch_bounds__(SORT_THREADS, 1)
    sort_members(const int* labels, long long batch, long long num_tokens,
                 long long num_groups, long long runs, int* run_counts, int* ends,
                 int* members) {
    const int* label = labels + blockIdx.x * num_tokens;  // (N,)
    int* end = ends + blockIdx.x * num_groups;            // (K,)
    int* member = members + blockIdx.x * num_tokens;      // (N,)
    const int num_runs = static_cast<int>(runs);
    if (run_counts == nullptr) {
        int* shared = reinterpret_cast<int*>(dynamic_shared());
        sort_sequence(label, num_tokens, num_groups, num_runs, shared,
                      shared + runs * num_groups, end, member);
    } else {
        int* sequence_counts = run_counts + blockIdx.x * (runs + 1) * num_groups;
        sort_sequence(label, num_tokens, num_groups, num_runs, sequence_counts,
                      sequence_counts + runs * num_groups, end, member);
    }
}

// The number of members of every group. One block, one sequence. Integer atomics are
// exact in any order.
// Shapes: labels (B, N), out (B, K).
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

// One block, one sequence. The position of a group is the largest index of its members,
// or -1 for an empty group.
// Shapes: labels (B, N), out (B, K).
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
