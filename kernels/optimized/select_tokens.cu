// Selection by a radix search; see basic/select_tokens.cu. One block, one sequence.
//
// The scores become unsigned integers in the same order (`ordered_bits`). The K-th
// highest score is then found eight bits at a time, from the highest bits down, without
// sorting.

// Find the highest digit d such that at least `left` scores have a digit >= d, with one
// warp. Subtract from `left` the number of scores with a digit above d.
__device__ __forceinline__ void choose_digit(const int* histogram, int* digit,
                                             int* left) {
    // Lane l has the digits 255 - 8 l down to 248 - 8 l.
    const int lane = threadIdx.x, wanted = *left, top = 255 - 8 * lane;
    int own = 0;
    for (int i = 0; i < 8; ++i) own += histogram[top - i];
    // Prefix sum: the scores with these digits or higher ones. `above` leaves out the
    // lane's own digits.
    int reached = own;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(~0u, reached, delta);
        if (lane >= delta) reached += other;
    }
    int above = reached - own;
    __syncwarp();  // every lane has read `left`
    if (above < wanted && wanted <= reached) {
        int d = top;
        for (; above + histogram[d] < wanted; --d) above += histogram[d];
        *digit = d;
        *left = wanted - above;
    }
}

// True for the K highest scores. The K-th highest score is found eight bits at a time:
// each round makes a histogram of the next digit over the scores that agree with it so
// far. All scores above it are selected, and of those equal to it, the ones with the
// lowest indices.
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    top_tokens(const acc_t* scores, const int* counts, long long batch,
               long long num_tokens, long long num_groups, bool* out) {
    __shared__ int histogram[256], scratch[32], digit, left;
    const acc_t* row = scores + blockIdx.x * num_tokens;  // (N,)
    const long long count = min(count_of(counts, blockIdx.x, num_groups), num_tokens);
    if (threadIdx.x == 0) left = static_cast<int>(count);

    bits_t threshold = 0;
    for (int shift = 8 * sizeof(bits_t) - 8; shift >= 0 && count > 0; shift -= 8) {
        for (int d = threadIdx.x; d < 256; d += blockDim.x) histogram[d] = 0;
        __syncthreads();
        for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
            const long long i = i0 + threadIdx.x;
            const bits_t bits = i < num_tokens ? ordered_bits(row[i]) : 0;
            const bool agrees = i < num_tokens && (bits ^ threshold) >> shift >> 8 == 0;
            const int d = agrees ? static_cast<int>(bits >> shift & 255) : -1;
            // Many scores have the same digit: the last lane of them adds their number,
            // instead of one atomic for each.
            const unsigned same = __match_any_sync(~0u, d);
            if (d >= 0 && same >> threadIdx.x % 32 == 1)
                atomicAdd(histogram + d, __popc(same));
        }
        __syncthreads();
        if (threadIdx.x < 32) choose_digit(histogram, &digit, &left);
        __syncthreads();
        threshold |= static_cast<bits_t>(digit) << shift;
    }

    // Write the selection; `left` is the number of ties to select.
    long long ties = 0;  // ties before these blockDim.x positions
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bits_t bits = i < num_tokens ? ordered_bits(row[i]) : 0;
        const bool tie = i < num_tokens && bits == threshold;
        int total;
        const long long rank = ties + block_rank(tie, scratch, &total);
        ties += total;
        if (i < num_tokens)
            out[i + blockIdx.x * num_tokens] = count > 0 && row[i] != padding() &&
                                               (tie ? rank < left : bits > threshold);
    }
}

// The positions of the selected tokens, ascending; -1 if there are fewer than K.
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    select_tokens(const bool* selected, long long batch, long long num_tokens,
                  long long num_groups, int* out) {
    __shared__ int scratch[32];
    const bool* row = selected + blockIdx.x * num_tokens;  // (N,)
    int* positions = out + blockIdx.x * num_groups;        // (K,)
    long long before = 0;  // selected tokens before these blockDim.x positions
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool is_selected = i < num_tokens && row[i];
        int total;
        const long long rank = before + block_rank(is_selected, scratch, &total);
        before += total;
        if (is_selected && rank < num_groups) positions[rank] = static_cast<int>(i);
    }
    for (long long k = before + threadIdx.x; k < num_groups; k += blockDim.x)
        positions[k] = -1;
}
