// Gumbel softmax, and the saliency mass computed from it. The formulas are in
// basic/gumbel_softmax.cu, basic/saliency_mass.cu and basic/saliency.cu. One block, one
// sequence: the scores stay in registers or in the result array between the steps.
//
// `RegisterRow`, `MemoryRow` and `visit_thread_tokens` are in rows.cuh: a thread visits
// its tokens as (t, i), its t-th token and the position of that token in the sequence.
// `Range`, `head_means`, `join_parts` and `add_layer` are in layers.cuh.
//
// Elementwise work (`saliency_mass`, and `perturbed_scores` if there is no noise or no
// mask) would gain nothing from a kernel here, so the launchers use the basic kernels
// for this work.

// Write the perturbed scores z = s + g of this thread's tokens to `scores`, with s from
// `saliency`; return the highest of these scores. The noise depends on the index of the
// token among the tokens of its sequence (padding is not counted). The block counts the
// tokens together to find this index (`rank`).
template <class Saliency, class Scores>
__device__ __forceinline__ acc_t perturb(const Saliency& saliency, const bool* mask,
                                         long long num_tokens, long long noisy,
                                         unsigned long long seed, long long sequence,
                                         Scores& scores) {
    __shared__ int scratch[32];
    acc_t highest = padding();
    long long before = 0;  // tokens before position i0
    int t = 0;
#pragma unroll 1  // the noise is 300 instructions: one copy of them is enough
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x, ++t) {
        const long long i = i0 + threadIdx.x;
        const bool token = i < num_tokens && is_token(mask, i);
        long long rank = i;
        if (mask && noisy) {
            int tokens;
            rank = before + block_rank(token, scratch, &tokens);
            before += tokens;
        }
        acc_t score = padding();
        if (token) {
            score = saliency.get(t, i);
            if (noisy) score += gumbel(seed, sequence, rank);
        }
        if (i < num_tokens) scores.set(t, i, score);
        highest = max(highest, score);
    }
    return highest;
}

// The kernel of basic/gumbel_softmax.cu, with one block for each sequence.
// Shapes: saliency, mask and out (B, N).
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    perturbed_scores(const real_t* saliency, const bool* mask, long long batch,
                     long long num_tokens, long long noisy, unsigned long long seed,
                     long long first_sequence, acc_t* out) {
    const long long sequence_start = blockIdx.x * num_tokens;  // in (B, N)
    const MemoryRow<const real_t> stored{saliency + sequence_start};
    MemoryRow<acc_t> perturbed{out + sequence_start};
    perturb(stored, mask ? mask + sequence_start : nullptr, num_tokens, noisy, seed,
            first_sequence + blockIdx.x, perturbed);
}

// Compute the perturbed scores, their softmax (`out`), and the saliency mass, which is
// 0 for padding. `scores` holds the perturbed scores first, and then their
// exponentials. `mask` and `mass` may be null. All arrays have shape (N,).
template <class Saliency, class Scores>
__device__ __forceinline__ void softmax_and_mass(
    const Saliency& saliency, Scores& scores, const bool* mask, long long num_tokens,
    double temperature, long long noisy, unsigned long long seed, long long sequence,
    double epsilon, acc_t* out, acc_t* mass) {
    __shared__ acc_t scratch[32];
    acc_t highest = perturb(saliency, mask, num_tokens, noisy, seed, sequence, scores);
    highest = block_reduce(highest, scratch, Greatest());

    // e^((z - m) / tau) and its sum, with the highest score m.
    acc_t total = 0;
    visit_thread_tokens(scores, num_tokens, [&](int t, long long i) {
        const acc_t score = scores.get(t, i);
        acc_t e = 0;
        // Divide in double: as a float, a temperature of 1e-46 would be 0.
        if (score != padding())
            e = exp(static_cast<acc_t>((score - highest) / temperature));
        scores.set(t, i, e);
        total += e;
    });
    total = block_reduce(total, scratch, Add());

    visit_thread_tokens(scores, num_tokens, [&](int t, long long i) {
        const acc_t p = total > 0 ? scores.get(t, i) / total : acc_t(0);
        out[i] = p;
        if (mass == nullptr) return;
        const acc_t token_mass = p * saliency.get(t, i) + (1 - p) * acc_t(epsilon);
        mass[i] = is_token(mask, i) ? token_mass : acc_t(0);
    });
}

// If a thread has at most THREAD_TOKENS tokens, the scores stay in registers. Otherwise
// the scores are in `out` until the probabilities replace them.
// Shapes: saliency, mask, out and mass (B, N).
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    gumbel_softmax(const real_t* saliency, const bool* mask, long long batch,
                   long long num_tokens, double temperature, long long noisy,
                   unsigned long long seed, long long first_sequence, double epsilon,
                   acc_t* out, acc_t* mass) {
    const long long sequence_start = blockIdx.x * num_tokens;  // in (B, N)
    const bool* valid = mask ? mask + sequence_start : nullptr;
    const MemoryRow<const real_t> stored{saliency + sequence_start};
    acc_t *p = out + sequence_start, *m = mass ? mass + sequence_start : nullptr;
    if (num_tokens <= THREAD_TOKENS * blockDim.x) {
        RegisterRow saliency_row, scores;
        visit_thread_tokens(saliency_row, num_tokens, [&](int t, long long i) {
            saliency_row.set(t, i, stored.get(t, i));
        });
        softmax_and_mass(saliency_row, scores, valid, num_tokens, temperature, noisy,
                         seed, first_sequence + blockIdx.x, epsilon, p, m);
    } else {
        MemoryRow<acc_t> scores{p};
        softmax_and_mass(stored, scores, valid, num_tokens, temperature, noisy, seed,
                         first_sequence + blockIdx.x, epsilon, p, m);
    }
}

// For each token t of this thread, add to sum[t] its entropy in every layer: the mean
// over the heads, scaled to 0 .. 1 by the range of the layer. `entropy` points to this
// sequence in layer 0 of (L, B, H, N). The results are those of `entropy_range` and
// `saliency` in saliency.cu.
//
// Each iteration of the loop works on `count` layers: one for each warp, or the layers
// that are left. To find their ranges, each layer is divided into parts = warps / count
// parts, one warp for each part: warp w reads part w % parts of layer w / parts.
__device__ __forceinline__ void add_layers(const real_t* entropy, const bool* mask,
                                           long long layers, long long batch,
                                           long long heads, long long num_tokens,
                                           acc_t (&sum)[THREAD_TOKENS]) {
    __shared__ acc_t lowest[32], highest[32];  // (layers, parts)
    __shared__ acc_t low[32], width[32];       // (layers,)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long layer_stride = batch * heads * num_tokens;
    const int length = static_cast<int>(num_tokens);
    acc_t mean[THREAD_TOKENS];
    for (long long l0 = 0; l0 < layers; l0 += warps, entropy += warps * layer_stride) {
        const int count =
            static_cast<int>(min(layers - l0, static_cast<long long>(warps)));
        const int parts = warps / count, layer = warp / parts;
        Range range;
        const int step = 32 * parts;
        for (int i = warp % parts * 32 + lane; i < length && layer < count;
             i += THREAD_TOKENS * step) {
            head_means(entropy + layer * layer_stride, heads, length, i, step, mean);
            range.add(mean, mask, length, i, step);
        }
        range.low = warp_reduce(range.low, Least());
        range.high = warp_reduce(range.high, Greatest());
        if (lane == 0) {
            lowest[warp] = range.low;
            highest[warp] = range.high;
        }
        __syncthreads();
        if (warp < count)
            join_parts(lowest + warp * parts, highest + warp * parts, parts, low + warp,
                       width + warp);
        __syncthreads();
        for (int l = 0; l < count; ++l) {
            head_means(entropy + l * layer_stride, heads, length,
                       static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                       mean);
            add_layer(mean, low[l], width[l], sum);
        }
        // No barrier is needed here. The next iteration writes `low` and `width` after
        // its first barrier, which a thread reaches after it has read both arrays.
    }
}

// Compute saliency, probabilities and mass from the entropies in a single launch. Each
// thread has at most THREAD_TOKENS tokens, which stay in registers.
// Shapes: entropy (L, B, H, N), all other arrays (B, N).
extern "C" __global__ void __launch_bounds__(SELECTION_THREADS, 1)
    saliency_gumbel_mass(const real_t* entropy, const bool* mask, long long layers,
                         long long batch, long long heads, long long num_tokens,
                         long long high_is_salient, double temperature, long long noisy,
                         unsigned long long seed, long long first_sequence,
                         double epsilon, acc_t* saliency_out, acc_t* probabilities_out,
                         acc_t* mass_out) {
    const long long b = blockIdx.x, sequence_start = b * num_tokens;  // in (B, N)
    const bool* valid = mask ? mask + sequence_start : nullptr;
    acc_t sum[THREAD_TOKENS] = {};
    add_layers(entropy + sequence_start * heads, valid, layers, batch, heads,
               num_tokens, sum);
    RegisterRow saliency, scores;
    visit_thread_tokens(saliency, num_tokens, [&](int t, long long i) {
        const acc_t salient = saliency_of(sum[t], layers, high_is_salient);
        saliency.values[t] = is_token(valid, i) ? salient : acc_t(0);
        saliency_out[sequence_start + i] = saliency.values[t];
    });
    softmax_and_mass(saliency, scores, valid, num_tokens, temperature, noisy, seed,
                     first_sequence + b, epsilon, probabilities_out + sequence_start,
                     mass_out + sequence_start);
}
