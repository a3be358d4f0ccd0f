// Groups: sizes, positions, and a counting sort: each group's members lie together, in
// index order.

constexpr int LABELS = 8;  // that a thread loads at once

// The members of one sequence, by a whole block. The first `runs` warps take a run of
// the tokens each. counts (runs, K) and begins (K,) are shared memory, or global.
__device__ __forceinline__ void sort_sequence(const int* label, long long num_tokens,
                                              long long num_groups, int runs,
                                              int* counts, int* begins, int* end,
                                              int* member) {
    __shared__ int scratch[32];
    const int thread = threadIdx.x, threads = blockDim.x;
    const int lane = thread % 32, warp = thread / 32;
    const long long steps = (num_tokens + 31) / 32;  // of 32 tokens
    const long long run = (steps + runs - 1) / runs * 32;
    const long long first = min(warp * run, num_tokens);  // N beyond `runs`
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

    // From counts to beginnings: of each group in its sequence, of each run in a group.
    int before = 0;  // members of the groups before these blockDim.x
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
        const int begin = before + block_sum_before(size, scratch, &total);
        before += total;
        if (k >= num_groups) continue;
        begins[k] = begin;
        end[k] = begin + size;
    }
    __syncthreads();

    // 32 tokens at a time: lanes of one group line up by lane, and the last of them
    // counts them all for the next 32.
    int next = first + lane < last ? label[first + lane] : -1;
    for (long long j0 = first; j0 < last; j0 += 32) {
        const long long j = j0 + lane;
        const int k = group_of(next, num_groups);
        next = j + 32 < last ? label[j + 32] : -1;
        const unsigned same = __match_any_sync(~0u, k);
        const int slot = k < 0 ? 0 : count[k] + __popc(same & ((1u << lane) - 1));
        __syncwarp();  // every lane has read the count
        if (k >= 0) {
            member[begins[k] + slot] = static_cast<int>(j);
            if (same >> lane == 1) count[k] = slot + 1;
        }
        __syncwarp();
    }
}

// One block, one sequence. members (B, N): the tokens of group 0, of group 1, ...;
// ends (B, K): where each group's members end, and the next one's begin. `counts`
// (B, runs + 1, K) is null where shared memory holds that of a sequence.
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
