// Selection by a radix search; see basic/select_tokens.cu for the definition and the
// shapes. One block, one sequence.
//
// The scores become unsigned integers in the same order (`ordered_bits` in common.cuh).
// The K-th highest score is then found eight bits (one digit) at a time, from the
// highest digit down, without sorting.

// Find the highest digit d such that at least `left` scores have a digit >= d, with one
// warp. Then subtract from `left` the number of scores with a digit above d.
__device__ __forceinline__ void choose_digit(const int* histogram, int* digit,
                                             int* left) {
    // Lane l has the digits 255 - 8 l down to 248 - 8 l.
    const int lane = threadIdx.x, wanted = *left, top = 255 - 8 * lane;
    int in_lane = 0;
    for (int i = 0; i < 8; ++i) in_lane += histogram[top - i];
    // Prefix sum: `up_to_lane` counts the scores with the digits of this lane or higher
    // ones. `above` leaves out the digits of this lane.
    int up_to_lane = in_lane;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(~0u, up_to_lane, delta);
        if (lane >= delta) up_to_lane += other;
    }
    int above = up_to_lane - in_lane;
    __syncwarp();  // every lane has read `left`
    if (above < wanted && wanted <= up_to_lane) {
        int d = top;
        for (; above + histogram[d] < wanted; --d) above += histogram[d];
        *digit = d;
        *left = wanted - above;
    }
}

// True for the K highest scores. Each round counts the next digit of all scores whose
// higher digits are those of `threshold`. After the last round, `threshold` is the K-th
// highest score. All scores above it are selected, and of the scores equal to it, the
// ones with the lowest indices.
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    top_tokens(const acc_t* scores, const int* counts, long long batch,
               long long num_tokens, long long num_groups, bool* out) {
    __shared__ int histogram[256], scratch[32], digit, left;
    const acc_t* sequence_scores = scores + blockIdx.x * num_tokens;  // (N,)
    const long long count = min(count_of(counts, blockIdx.x, num_groups), num_tokens);
    if (threadIdx.x == 0) left = static_cast<int>(count);

    bits_t threshold = 0;
    for (int shift = 8 * sizeof(bits_t) - 8; shift >= 0 && count > 0; shift -= 8) {
        for (int d = threadIdx.x; d < 256; d += blockDim.x) histogram[d] = 0;
        __syncthreads();
        for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
            const long long i = i0 + threadIdx.x;
            const bits_t bits = i < num_tokens ? ordered_bits(sequence_scores[i]) : 0;
            const bool agrees = i < num_tokens && (bits ^ threshold) >> shift >> 8 == 0;
            const int d = agrees ? static_cast<int>(bits >> shift & 255) : -1;
            // Many scores have the same digit. The last lane with a digit adds the
            // number of these lanes, instead of one atomic for each lane.
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
    long long ties = 0;  // ties before position i0
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bits_t bits = i < num_tokens ? ordered_bits(sequence_scores[i]) : 0;
        const bool tie = i < num_tokens && bits == threshold;
        int total;
        const long long rank = ties + block_rank(tie, scratch, &total);
        ties += total;
        if (i < num_tokens)
            out[i + blockIdx.x * num_tokens] = count > 0 &&
                                               sequence_scores[i] != padding() &&
                                               (tie ? rank < left : bits > threshold);
    }
}

// The positions of the selected tokens, ascending; -1 if there are fewer than K.
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    select_tokens(const bool* selected, long long batch, long long num_tokens,
                  long long num_groups, int* out) {
    __shared__ int scratch[32];
    const bool* sequence_selected = selected + blockIdx.x * num_tokens;  // (N,)
    int* positions = out + blockIdx.x * num_groups;                      // (K,)
    long long before = 0;  // selected tokens before position i0
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool is_selected = i < num_tokens && sequence_selected[i];
        int total;
        const long long rank = before + block_rank(is_selected, scratch, &total);
        before += total;
        if (is_selected && rank < num_groups) positions[rank] = static_cast<int>(i);
    }
    for (long long k = before + threadIdx.x; k < num_groups; k += blockDim.x)
        positions[k] = -1;
}
