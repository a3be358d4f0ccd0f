// Matching: the only step of basic/bipartite.cu that is not elementwise. The other
// steps run from that file, which also has the shapes.

// The rows of `out` (3, B) are the number n of groups that may merge, the number of odd
// groups (0 if nothing merges), and the number of merges r = min(n - wanted, n / 2,
// step), or 0 if this is negative. `wanted` is K minus the number of protected tokens,
// but at least 1. One block counts one sequence. Integer atomics give the same result
// in any order.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    match_counts(const int* positions, const bool* mask, const bool* protect,
                 const int* counts, long long batch, long long num_tokens,
                 long long num_groups, long long step, int* out) {
    // n, the number of groups that may merge, and the number of protected tokens.
    __shared__ int num_mergeable, num_fixed;
    const long long b = blockIdx.x, sequence_start = b * num_tokens;  // in (B, N)
    if (threadIdx.x == 0) num_mergeable = num_fixed = 0;
    __syncthreads();
    int highest = 0, fixed = 0;
    for (long long i = sequence_start + threadIdx.x; i < sequence_start + num_tokens;
         i += blockDim.x) {
        highest = max(highest, positions[i] + 1);
        fixed += protect != nullptr && protect[i] && is_token(mask, i);
    }
    atomicMax(&num_mergeable, highest);
    atomicAdd(&num_fixed, fixed);
    __syncthreads();
    if (threadIdx.x > 0) return;
    // Protected tokens are groups of their own, so the other tokens form K - num_fixed
    // groups.
    const long long wanted = max(count_of(counts, b, num_groups) - num_fixed, 1ll);
    const long long groups = num_mergeable;
    const long long merges = max(min(min(groups - wanted, groups / 2), step), 0ll);
    out[b] = num_mergeable;
    out[batch + b] = merges > 0 ? num_mergeable / 2 : 0;
    out[2 * batch + b] = static_cast<int>(merges);
}
