// The transformer prior: the steps of a layer between its linear maps. The linear maps
// themselves are `linear` in linear.cu.
//
//   x += W_o attend(heads(W_qkv norm(x)))     x += W_2 gelu(W_1 norm(x))
//
//   attend  = sum_j p_ij v_j,  p_i = softmax_j(q_i . k_j scale + log size_j)
//
// norm is `normalize` in linear.cu. Token i attends to the tokens j <= i or, in
// reverse, to the tokens j >= i. Because of log size_j, a merged token that represents
// `size` tokens receives as much attention as that many equal tokens. A token of size 0
// receives none.
//
// Arrays have B sequences, H heads and d elements of a head. T is the number of tokens
// of this call. The key-value cache has `capacity` rows for each head; the keys and
// values of these T tokens are in the rows from `start` on.

// Split `qkv` (B, T, 3, H, d), the output of W_qkv, into queries (B, T, H, d), keys and
// values. Keys and values are written to the key-value cache (B, H, capacity, d) from
// row `start` on.
//
// If `turns` (d / 2,) is not null, queries and keys are rotated (rotary position
// embedding, Su et al. 2021, arXiv:2104.09864). Elements i and i + d / 2 are a vector
// in the plane; it is rotated by position * turns[i] full turns. If `positions` (B, T)
// is null, the position of token t is start + t. One thread, one element of a query, a
// key and a value.
extern "C" __global__ void split_heads(const real_t* qkv, const long long* positions,
                                       const double* turns, long long batch,
                                       long long num_tokens, long long num_heads,
                                       long long head_dim, long long capacity,
                                       long long start, real_t* query, real_t* keys,
                                       real_t* values) {
    const long long index = thread_index();  // (B, T, H, d)
    const long long dim = num_heads * head_dim, half = head_dim / 2;
    if (index >= batch * num_tokens * dim) return;
    const long long token = index / dim, b = token / num_tokens, t = token % num_tokens;
    const long long h = index % dim / head_dim, d = index % head_dim;
    const real_t* q = qkv + token * 3 * dim + h * head_dim;
    const real_t* k = q + dim;
    const real_t* v = k + dim;

    acc_t cosine = 1, sine = 0;
    if (turns) {
        const long long position = positions ? positions[token] : start + t;
        // Reduce the angle to half a turn in double, before it becomes acc_t.
        const double turn = position * turns[d % half];
        const acc_t angle = acc_t(6.283185307179586 * (turn - rint(turn)));
        cosine = cos(angle), sine = d < half ? -sin(angle) : sin(angle);
    }
    const long long partner = d < half ? d + half : d - half;
    const long long cache_index =
        ((b * num_heads + h) * capacity + start + t) * head_dim + d;
    store(query + index, widen(q[d]) * cosine + widen(q[partner]) * sine);
    store(keys + cache_index, widen(k[d]) * cosine + widen(k[partner]) * sine);
    store(values + cache_index, widen(v[d]));
}

// Attention of T queries to the keys and values in the cache. Query t belongs to token
// start + t. A count is the number of tokens of a sequence among these T. One thread,
// one output. The softmax is computed online: m is the largest score so far, r = sum_j
// e^(score_j - m), and sum = sum_j e^(score_j - m) v_j.
// Shapes: query and out (B, T, H, d), keys and values (B, H, capacity, d), sizes
// (B, capacity), counts (B,).
extern "C" __global__ void attend(const real_t* query, const real_t* keys,
                                  const real_t* values, const acc_t* sizes,
                                  const int* counts, long long batch,
                                  long long num_queries, long long num_heads,
                                  long long head_dim, long long capacity,
                                  long long start, long long reversed, double scale,
                                  real_t* out) {
    const long long index = thread_index();  // (B, T, H, d)
    const long long dim = num_heads * head_dim;
    if (index >= batch * num_queries * dim) return;
    const long long b = index / dim / num_queries, d = index % head_dim;
    const long long position = start + index / dim % num_queries;
    const long long count = start + count_of(counts, b, num_queries);
    const long long first_key = reversed ? position : 0;
    const long long end_key = reversed ? count : min(position + 1, count);
    const real_t* q = query + index - d;
    const long long cache_row = (b * num_heads + index % dim / head_dim) * capacity;

    acc_t m = MASKED_SCORE, r = 0, sum = 0;
    for (long long j = first_key; j < end_key; ++j) {
        const acc_t size = sizes ? sizes[b * capacity + j] : acc_t(1);
        if (!(size > 0)) continue;
        acc_t dot = 0;
        for (long long i = 0; i < head_dim; ++i)
            dot += widen(q[i]) * widen(keys[(cache_row + j) * head_dim + i]);
        // Both sums are relative to m. If m grows to new_m, multiply them by
        // e^(m - new_m).
        const acc_t score = dot * acc_t(scale) + log(size), new_m = max(m, score);
        const acc_t rescale = exp(m - new_m), p = exp(score - new_m);
        r = r * rescale + p;
        sum = sum * rescale + p * widen(values[(cache_row + j) * head_dim + d]);
        m = new_m;
    }
    store(out + index, r > 0 ? sum / r : acc_t(0));
}
