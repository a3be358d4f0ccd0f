// Selection: one block, one sequence; see basic/selection.cu. What is elementwise there
// (perturbed_scores without noise or padding, saliency_mass) has nothing to gain and
// runs from there.

// out = the perturbed scores, (N,); returns the highest of this thread's. Draw n is the
// n-th token's, wherever padding lies, and the block counts the tokens together.
template <class T>
__device__ __forceinline__ acc_t perturb(const T* saliency, const bool* mask,
                                         long long num_tokens, long long noisy,
                                         unsigned long long seed, long long sequence,
                                         acc_t* out) {
    __shared__ int scratch[32];
    acc_t highest = padding();
    long long before = 0;  // tokens before these blockDim.x places
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        int tokens;
        const long long rank = before + block_rank(token, scratch, &tokens);
        before += tokens;
        acc_t score = padding();
        if (token) {
            score = widen(saliency[i]);
            if (noisy) score += gumbel(seed, sequence, rank);
        }
        if (i < num_tokens) out[i] = score;
        highest = max(highest, score);
    }
    return highest;
}

extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    perturbed_scores(const real_t* saliency, const bool* mask, long long batch,
                     long long num_tokens, long long noisy, unsigned long long seed,
                     long long first, acc_t* out) {
    const long long row = blockIdx.x * num_tokens;  // of (B, N)
    perturb(saliency + row, mask ? mask + row : nullptr, num_tokens, noisy, seed,
            first + blockIdx.x, out + row);
}

// The noise, the softmax over it and the saliency mass, which is 0 for padding. Each
// thread comes back to its own tokens, so `out` can hold the scores, then their
// exponentials, then the probabilities. `mask` and `mass` may be null; all arrays are
// (N,).
template <class T>
__device__ __forceinline__ void softmax_and_mass(const T* saliency, const bool* mask,
                                                 long long num_tokens,
                                                 double temperature, long long noisy,
                                                 unsigned long long seed,
                                                 long long sequence, double epsilon,
                                                 acc_t* out, acc_t* mass) {
    __shared__ acc_t scratch[32];
    acc_t highest = perturb(saliency, mask, num_tokens, noisy, seed, sequence, out);
    highest = block_reduce(highest, scratch, Greatest());

    acc_t total = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t score = out[i];
        acc_t e = 0;
        if (score != padding())  // in double, where no temperature is too small
            e = exp(static_cast<acc_t>((score - highest) / temperature));
        out[i] = e;
        total += e;
    }
    total = block_reduce(total, scratch, Add());

    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t p = total > 0 ? out[i] / total : acc_t(0);
        out[i] = p;
        if (mass == nullptr) continue;
        const acc_t whole = p * widen(saliency[i]) + (1 - p) * acc_t(epsilon);
        mass[i] = is_token(mask, i) ? whole : acc_t(0);
    }
}

extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    gumbel_softmax(const real_t* saliency, const bool* mask, long long batch,
                   long long num_tokens, double temperature, long long noisy,
                   unsigned long long seed, long long first, double epsilon, acc_t* out,
                   acc_t* mass) {
    const long long row = blockIdx.x * num_tokens;  // of (B, N)
    softmax_and_mass(saliency + row, mask ? mask + row : nullptr, num_tokens,
                     temperature, noisy, seed, first + blockIdx.x, epsilon, out + row,
                     mass ? mass + row : nullptr);
}

// The same from the entropies (L, B, H, N) on: entropy_range and saliency of
// saliency.cu come first, a layer at a time.
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    saliency_gumbel_mass(const real_t* entropy, const bool* mask, long long layers,
                         long long batch, long long heads, long long num_tokens,
                         long long salient_high, double temperature, long long noisy,
                         unsigned long long seed, long long first, double epsilon,
                         acc_t* saliency_out, acc_t* probabilities_out,
                         acc_t* mass_out) {
    __shared__ acc_t scratch[32];
    const long long b = blockIdx.x;
    const bool* valid = mask ? mask + b * num_tokens : nullptr;  // (N,)
    acc_t* saliency = saliency_out + b * num_tokens;             // (N,)
    acc_t* mean = probabilities_out + b * num_tokens;  // (N,), over heads, for now
    for (long long l = 0; l < layers; ++l) {
        const real_t* rows = entropy + (l * batch + b) * heads * num_tokens;  // (H, N)
        acc_t low = -NEVER, high = NEVER;
        for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
            if (!is_token(valid, i)) continue;
            acc_t sum = 0;
            for (long long h = 0; h < heads; ++h)
                sum += widen(rows[h * num_tokens + i]);
            mean[i] = sum / heads;
            low = min(low, mean[i]);
            high = max(high, mean[i]);
        }
        low = block_reduce(low, scratch, Least());
        high = block_reduce(high, scratch, Greatest());
        for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
            const acc_t before = l > 0 ? saliency[i] : acc_t(0);
            const bool counts = high > low && is_token(valid, i);
            saliency[i] = counts ? before + (mean[i] - low) / (high - low) : before;
        }
    }
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        const acc_t normal = saliency[i] / layers;
        const acc_t salient = salient_high ? normal : 1 - normal;
        saliency[i] = is_token(valid, i) ? salient : 0;
    }
    softmax_and_mass(saliency, valid, num_tokens, temperature, noisy, seed, first + b,
                     epsilon, mean, mass_out + b * num_tokens);
}

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
