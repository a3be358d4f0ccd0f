// Saliency from entropies; see basic/saliency.cu for the formula and layers.cuh for the
// steps (`head_means`, `Range`, `join_parts`, `add_layer`, `saliency_of`). A row of
// tokens is divided into parts, one block for each, with THREAD_TOKENS tokens in each
// thread.

// Compute the means over the heads, write them, and find their range in each part.
// `means` is null if there is only one head: the means are then the entropies
// themselves. One block, one part of one layer of one sequence.
// Shapes: entropy (L, B, H, N), mask (B, N), lowest and highest (L, B, parts), means
// (L, B, N).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    entropy_range(const real_t* entropy, const bool* mask, long long layers,
                  long long batch, long long heads, long long num_tokens, acc_t* lowest,
                  acc_t* highest, acc_t* means) {
    __shared__ acc_t scratch[32];
    const long long part_tokens = THREAD_TOKENS * blockDim.x;
    const long long parts = (num_tokens + part_tokens - 1) / part_tokens;
    const long long layer = blockIdx.x / parts;  // a layer of a sequence, in (L, B)
    const long long first_token = blockIdx.x % parts * part_tokens + threadIdx.x;
    const long long step = blockDim.x;
    const bool* valid = mask ? mask + layer % batch * num_tokens : nullptr;  // (N,)
    acc_t mean[THREAD_TOKENS];
    head_means(entropy + layer * heads * num_tokens, heads, num_tokens, first_token,
               step, mean);
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first_token + t * blockDim.x;
        if (means && i < num_tokens) means[layer * num_tokens + i] = mean[t];
    }
    Range range;
    range.add(mean, valid, num_tokens, first_token, step);
    const acc_t low = block_reduce(range.low, scratch, Least());
    const acc_t high = block_reduce(range.high, scratch, Greatest());
    if (threadIdx.x > 0) return;
    lowest[blockIdx.x] = low;
    highest[blockIdx.x] = high;
}

// Compute the saliency from the means over the heads and the ranges of the parts. One
// block, one part of one sequence. `means` has the type acc_t if `entropy_range` wrote
// it. With one head it is the array of entropies, in its own type. The launch compiles
// this kernel with real_t equal to the type of `means`. `head_means` is called with one
// head here, so it only loads the means.
// Shapes: means (L, B, N), mask and out (B, N), lowest and highest (L, B, parts).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    saliency(const real_t* means, const bool* mask, const acc_t* lowest,
             const acc_t* highest, long long layers, long long batch,
             long long num_tokens, long long high_is_salient, acc_t* out) {
    constexpr int LAYERS = 32;  // layers whose ranges are in shared memory
    constexpr int AT_ONCE = 4;  // layers whose means a thread loads at once
    __shared__ acc_t low[LAYERS], width[LAYERS];
    const long long part_tokens = THREAD_TOKENS * blockDim.x;
    const long long parts = (num_tokens + part_tokens - 1) / part_tokens;
    const long long b = blockIdx.x / parts;
    const long long first_token = blockIdx.x % parts * part_tokens + threadIdx.x;
    const long long step = blockDim.x;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    acc_t sum[THREAD_TOKENS] = {};
    for (long long l0 = 0; l0 < layers; l0 += LAYERS) {
        const int count =
            static_cast<int>(min(layers - l0, static_cast<long long>(LAYERS)));
        const long long layer0 = l0 * batch + b;  // in (L, B)
        for (int l = warp; l < count; l += warps) {
            const long long part0 = (layer0 + l * batch) * parts;
            join_parts(lowest + part0, highest + part0, parts, low + l, width + l);
        }
        __syncthreads();
        const real_t* layer_means = means + layer0 * num_tokens;
        for (int l = 0; l < count; l += AT_ONCE) {
            acc_t mean[AT_ONCE][THREAD_TOKENS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)  // issue all loads before any division
                head_means(layer_means + min(l + j, count - 1) * batch * num_tokens, 1,
                           num_tokens, first_token, step, mean[j]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (l + j < count) add_layer(mean[j], low[l + j], width[l + j], sum);
        }
        __syncthreads();  // the next layers overwrite the ranges
    }
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first_token + t * blockDim.x, index = b * num_tokens + i;
        if (i >= num_tokens) continue;
        const acc_t salient = saliency_of(sum[t], layers, high_is_salient);
        out[index] = is_token(mask, index) ? salient : acc_t(0);
    }
}
