// Selection: one block, one sequence; see basic/select_tokens.cu.

// One warp finds the highest digit d such that the scores with a digit >= d are `left`
// or more; `left` becomes what those above d leave over.
__device__ __forceinline__ void choose_digit(const int* histogram, int* digit,
                                             int* left) {
    // Lane l has eight digits, the highest first.
    const int lane = threadIdx.x, wanted = *left, top = 255 - 8 * lane;
    int own = 0;
    for (int i = 0; i < 8; ++i) own += histogram[top - i];
    int reached = own;  // by these digits and all above them
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

// The K-th highest score is found eight bits at a time, from a histogram of the scores
// that agree with it so far. Those above it are in, and of its equals the first ones.
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
            // Many share a digit: the last lane adds for all that do.
            const unsigned same = __match_any_sync(~0u, d);
            if (d >= 0 && same >> threadIdx.x % 32 == 1)
                atomicAdd(histogram + d, __popc(same));
        }
        __syncthreads();
        if (threadIdx.x < 32) choose_digit(histogram, &digit, &left);
        __syncthreads();
        threshold |= static_cast<bits_t>(digit) << shift;
    }

    long long ties = 0;  // before these blockDim.x places
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bits_t bits = i < num_tokens ? ordered_bits(row[i]) : 0;
        const bool tie = i < num_tokens && bits == threshold;
        int found;
        const long long rank = ties + block_rank(tie, scratch, &found);
        ties += found;
        if (i < num_tokens)
            out[i + blockIdx.x * num_tokens] = count > 0 && row[i] != padding() &&
                                               (tie ? rank < left : bits > threshold);
    }
}

extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    select_tokens(const bool* selected, long long batch, long long num_tokens,
                  long long num_groups, int* out) {
    __shared__ int scratch[32];
    const bool* row = selected + blockIdx.x * num_tokens;  // (N,)
    int* positions = out + blockIdx.x * num_groups;        // (K,)
    long long before = 0;  // selected ones before these blockDim.x places
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool chosen = i < num_tokens && row[i];
        int found;
        const long long rank = before + block_rank(chosen, scratch, &found);
        before += found;
        if (chosen && rank < num_groups) positions[rank] = static_cast<int>(i);
    }
    for (long long k = before + threadIdx.x; k < num_groups; k += blockDim.x)
        positions[k] = -1;
}
