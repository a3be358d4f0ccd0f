// Matching: the steps of basic/matching.cu that are not elementwise.

// One warp, one row.
extern "C" __global__ void unit_tokens(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index() / 32;  // (B, N)
    if (row >= num_rows) return;
    const int lane = threadIdx.x % 32;
    const real_t* x = tokens + row * dim;
    const long long end = is_token(mask, row) ? dim : 0;  // the same for all lanes
    acc_t peak = 0, squares = 0;
    for (long long d = lane; d < end; d += 32) peak = max(peak, abs(widen(x[d])));
    peak = warp_reduce(peak, Greatest());
    for (long long d = lane; d < dim && peak > 0; d += 32)
        squares += widen(x[d]) / peak * (widen(x[d]) / peak);
    const acc_t norm = sqrt(warp_reduce(squares, Add()));
    for (long long d = lane; d < dim; d += 32)
        out[row * dim + d] = peak > 0 ? widen(x[d]) / peak / norm : acc_t(0);
}

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
