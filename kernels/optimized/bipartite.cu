// Matching: the step of basic/bipartite.cu that is not elementwise.

// One block, one sequence.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    match_counts(const int* places, const bool* mask, const bool* protect,
                 const int* counts, long long batch, long long num_tokens,
                 long long num_groups, int* out) {
    __shared__ int num_places, num_fixed;
    const long long b = blockIdx.x, row = b * num_tokens;  // of (B, N)
    if (threadIdx.x == 0) num_places = num_fixed = 0;
    __syncthreads();
    int most = 0, fixed = 0;
    for (long long i = row + threadIdx.x; i < row + num_tokens; i += blockDim.x) {
        most = max(most, places[i] + 1);
        fixed += protect != nullptr && protect[i] && is_token(mask, i);
    }
    atomicMax(&num_places, most);
    atomicAdd(&num_fixed, fixed);
    __syncthreads();
    if (threadIdx.x > 0) return;
    const long long wanted = max(count_of(counts, b, num_groups) - num_fixed, 1ll);
    const long long groups = num_places;
    const long long merges = max(min(groups - wanted, groups / 2), 0ll);
    out[b] = num_places;
    out[batch + b] = merges > 0 ? num_places / 2 : 0;
    out[2 * batch + b] = static_cast<int>(merges);
}
