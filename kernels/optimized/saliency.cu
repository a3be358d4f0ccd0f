// Saliency from entropies; see basic/saliency.cu for the formula and layers.cuh for the
// steps. A row of tokens is divided into parts, one block for each, with THREAD_TOKENS
// tokens in each thread.

// Compute the range of the entropies of each part (L, B, parts) and, unless `means`
// (L, B, N) is null, write the means over the heads. One block, one part of one layer
// of one sequence.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    entropy_range(const real_t* entropy, const bool* mask, long long layers,
                  long long batch, long long heads, long long num_tokens, acc_t* lowest,
                  acc_t* highest, acc_t* means) {
    __shared__ acc_t scratch[32];
    const long long tokens = THREAD_TOKENS * blockDim.x;  // in a part
    const long long parts = (num_tokens + tokens - 1) / tokens;
    const long long row = blockIdx.x / parts;  // (L, B)
    const long long first = blockIdx.x % parts * tokens + threadIdx.x;
    const long long step = blockDim.x;
    const bool* valid = mask ? mask + row % batch * num_tokens : nullptr;  // (N,)
    acc_t mean[THREAD_TOKENS];
    head_means(entropy + row * heads * num_tokens, heads, num_tokens, first, step,
               mean);
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first + t * blockDim.x;
        if (means && i < num_tokens) means[row * num_tokens + i] = mean[t];
    }
    Range range;
    range.add(mean, valid, num_tokens, first, step);
    const acc_t low = block_reduce(range.low, scratch, Least());
    const acc_t high = block_reduce(range.high, scratch, Greatest());
    if (threadIdx.x > 0) return;
    lowest[blockIdx.x] = low;
    highest[blockIdx.x] = high;
}

// Compute the saliency from the means over the heads (L, B, N) and the ranges of the
// parts (L, B, parts). One block, one part of one sequence.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    saliency(const real_t* means, const bool* mask, const acc_t* lowest,
             const acc_t* highest, long long layers, long long batch,
             long long num_tokens, long long salient_high, acc_t* out) {
    constexpr int LAYERS = 32;  // layers with their ranges in shared memory at once
    constexpr int AT_ONCE = 4;  // layers of which a thread loads the means at once
    __shared__ acc_t low[LAYERS], width[LAYERS];
    const long long tokens = THREAD_TOKENS * blockDim.x;
    const long long parts = (num_tokens + tokens - 1) / tokens;
    const long long b = blockIdx.x / parts;
    const long long first = blockIdx.x % parts * tokens + threadIdx.x;
    const long long step = blockDim.x;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    acc_t sum[THREAD_TOKENS] = {};
    for (long long l0 = 0; l0 < layers; l0 += LAYERS) {
        const int count =
            static_cast<int>(min(layers - l0, static_cast<long long>(LAYERS)));
        const long long row0 = l0 * batch + b;  // (L, B)
        for (int l = warp; l < count; l += warps) {
            const long long part0 = (row0 + l * batch) * parts;
            join_parts(lowest + part0, highest + part0, parts, low + l, width + l);
        }
        __syncthreads();
        const real_t* rows = means + row0 * num_tokens;
        for (int l = 0; l < count; l += AT_ONCE) {
            acc_t mean[AT_ONCE][THREAD_TOKENS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)  // issue all loads before any division
                head_means(rows + min(l + j, count - 1) * batch * num_tokens, 1,
                           num_tokens, first, step, mean[j]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (l + j < count) add_layer(mean[j], low[l + j], width[l + j], sum);
        }
        __syncthreads();  // the ranges of the next layers overwrite these
    }
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first + t * blockDim.x, index = b * num_tokens + i;
        if (i >= num_tokens) continue;
        const acc_t salient = saliency_of(sum[t], layers, salient_high);
        out[index] = is_token(mask, index) ? salient : acc_t(0);
    }
}
