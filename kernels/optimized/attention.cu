// The transformer prior; see basic/attention.cu for the formulas and the shapes.
// `split_heads` rotates both elements of a pair in one thread, and `attend` goes
// through the keys once.

constexpr int MAX_WARPS = BLOCK_THREADS / 32;

// One thread, one pair of elements (i, i + d / 2) of a query, a key and a value. The
// sine and cosine are computed once for the four results of query and key.
extern "C" __global__ void split_heads(const real_t* qkv, const long long* positions,
                                       const double* turns, long long batch,
                                       long long num_tokens, long long num_heads,
                                       long long head_dim, long long capacity,
                                       long long start, real_t* query, real_t* keys,
                                       real_t* values) {
    const long long index = thread_index();  // (B, T, H, d / 2)
    const long long half = head_dim / 2, dim = num_heads * head_dim;
    if (index >= batch * num_tokens * num_heads * half) return;
    const long long query_head = index / half, i = index % half;  // (B, T, H)
    const long long token = query_head / num_heads, h = query_head % num_heads;
    const long long b = token / num_tokens, t = token % num_tokens;
    const real_t* q = qkv + token * 3 * dim + h * head_dim + i;
    const real_t* k = q + dim;
    const real_t* v = k + dim;

    acc_t cosine = 1, sine = 0;
    if (turns) {
        const long long position = positions ? positions[token] : start + t;
        // Subtract the whole turns in double. The rest is at most half a turn, so it
        // keeps its precision in acc_t.
        const double turn = position * turns[i];
        const acc_t angle = acc_t(6.283185307179586 * (turn - rint(turn)));
        cosine = cos(angle), sine = sin(angle);
    }
    const auto rotate = [&](const real_t* x, real_t* y) {
        const acc_t x0 = widen(x[0]), x1 = widen(x[half]);
        store(y, x0 * cosine - x1 * sine);
        store(y + half, x1 * cosine + x0 * sine);
    };
    const long long cache_index =
        ((b * num_heads + h) * capacity + start + t) * head_dim + i;
    rotate(q, query + query_head * head_dim + i);
    rotate(k, keys + cache_index);
    values[cache_index] = v[0], values[cache_index + half] = v[half];
}

// One block, one query of one head. Each warp takes 32 keys at a time. First each lane
// computes the score of one key. Then the warp goes through the 32 values, and each
// lane adds the elements lane, lane + 32, ... of each value. Every warp keeps its own
// online softmax: the largest score m, the sum r of e^(score - m), and the sum of
// e^(score - m) v. Keys are assigned to warps by position, and the warps are combined
// in order, so every run gives the same bits.
extern "C" __global__ void attend(const real_t* query, const real_t* keys,
                                  const real_t* values, const acc_t* sizes,
                                  const int* counts, long long batch,
                                  long long num_queries, long long num_heads,
                                  long long head_dim, long long capacity,
                                  long long start, long long reversed, double scale,
                                  real_t* out) {
    __shared__ acc_t q[MAX_HEAD_DIM];
    __shared__ acc_t sums[MAX_WARPS][MAX_HEAD_DIM];
    __shared__ acc_t warp_m[MAX_WARPS], warp_r[MAX_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long index = blockIdx.x;  // (B, T, H)
    const long long b = index / num_heads / num_queries;
    const long long position = start + index / num_heads % num_queries;
    const long long count = start + count_of(counts, b, num_queries);
    const long long first_key = reversed ? position : 0;
    const long long end_key = reversed ? count : min(position + 1, count);
    const long long cache_row = (b * num_heads + index % num_heads) * capacity;

    for (long long d = threadIdx.x; d < head_dim; d += blockDim.x)
        q[d] = widen(query[index * head_dim + d]) * acc_t(scale);
    __syncthreads();  // the query is complete

    acc_t m = MASKED_SCORE, r = 0,
          sum[MAX_HEAD_DIM / 32] = {};  // sum[c]: column 32 c + lane
    for (long long j0 = first_key + warp * 32; j0 < end_key; j0 += warps * 32) {
        const long long j = j0 + lane;
        const acc_t size = j >= end_key ? acc_t(0)
                           : sizes      ? sizes[b * capacity + j]
                                        : acc_t(1);
        // score = q . k scale + log(size); the shared q is multiplied by `scale`
        // already.
        acc_t score = MASKED_SCORE;
        if (size > 0) {
            const real_t* key = keys + (cache_row + j) * head_dim;
            score = log(size);
            for (long long d = 0; d < head_dim; d += WIDTH) {
                acc_t k[WIDTH];
                load_vector(k, key + d, head_dim - d);
                for (int i = 0; i < WIDTH && d + i < head_dim; ++i)
                    score += q[d + i] * k[i];
            }
        }
        // All sums are relative to m. If m grows to new_m, multiply them by
        // e^(m - new_m).
        const acc_t new_m = max(m, warp_reduce(score, Greatest()));
        const acc_t p = size > 0 ? exp(score - new_m) : acc_t(0),
                    rescale = exp(m - new_m);
        m = new_m;
        r = r * rescale + warp_reduce(p, Add());
#pragma unroll
        for (int c = 0; c < MAX_HEAD_DIM / 32; ++c) sum[c] *= rescale;
        // Add p_k v_k for each of the 32 keys; the lane of key k has p_k.
        for (int k = 0; k < 32 && j0 + k < end_key; ++k) {
            const acc_t weight = __shfl_sync(~0u, p, k);
            if (weight == 0) continue;
            const real_t* value = values + (cache_row + j0 + k) * head_dim;
#pragma unroll
            for (int c = 0; c < MAX_HEAD_DIM / 32; ++c)
                if (c * 32 + lane < head_dim)
                    sum[c] += weight * widen(value[c * 32 + lane]);
        }
    }
    if (lane == 0) warp_m[warp] = m, warp_r[warp] = r;
#pragma unroll
    for (int c = 0; c < MAX_HEAD_DIM / 32; ++c) sums[warp][c * 32 + lane] = sum[c];
    __syncthreads();

    // Combine the warps, relative to the largest score of all.
    acc_t block_m = MASKED_SCORE, block_r = 0;
    for (int w = 0; w < warps; ++w) block_m = max(block_m, warp_m[w]);
    for (int w = 0; w < warps; ++w) block_r += warp_r[w] * exp(warp_m[w] - block_m);
    for (long long d = threadIdx.x; d < head_dim; d += blockDim.x) {
        acc_t y = 0;
        for (int w = 0; w < warps; ++w) y += sums[w][d] * exp(warp_m[w] - block_m);
        store(out + index * head_dim + d, block_r > 0 ? y / block_r : acc_t(0));
    }
}
