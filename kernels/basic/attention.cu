// The transformer prior: the steps of a layer between its linear maps. The linear maps
// themselves are `linear` in linear.cu.
//
//   x += W_o attend(heads(W_qkv norm(x)))     x += W_2 gelu(W_1 norm(x))
//
//   attend  = sum_j p_ij v_j,  p_i = softmax_j(q_i . k_j scale + log size_j)
//
// Token i attends to the tokens j <= i or, in reverse, to the tokens j >= i. A merged
// token that represents `size` tokens receives as much attention as that many equal
// tokens would, because of log size_j. A token of size 0 receives none.

// Split heads (B, T, 3, H, d) into queries (B, T, H, d) and into keys and values, which
// are written to the key-value cache (B, H, capacity, d) from row `start` on.
//
// With `turns` (d / 2,) queries and keys are rotated (rotary position embedding, Su et
// al. 2021, arXiv:2104.09864). Elements i and i + d / 2 are a vector in the plane; it
// is rotated by position * turns[i] full turns. Without `positions` (B, T), the
// position of token t is start + t. One thread, one element of all three.
extern "C" __global__ void split_heads(const real_t* heads, const long long* positions,
                                       const double* turns, long long batch,
                                       long long num_tokens, long long num_heads,
                                       long long head_dim, long long capacity,
                                       long long start, real_t* query, real_t* keys,
                                       real_t* values) {
    const long long index = thread_index();  // (B, T, H, d)
    const long long dim = num_heads * head_dim, half = head_dim / 2;
    if (index >= batch * num_tokens * dim) return;
    const long long row = index / dim, b = row / num_tokens, t = row % num_tokens;
    const long long h = index % dim / head_dim, d = index % head_dim;
    const real_t* q = heads + row * 3 * dim + h * head_dim;
    const real_t* k = q + dim;
    const real_t* v = k + dim;

    acc_t cosine = 1, sine = 0;
    if (turns) {
        const long long position = positions ? positions[row] : start + t;
        // Reduce the angle to half a turn in double, before it becomes acc_t.
        const double turn = position * turns[d % half];
        const acc_t angle = acc_t(6.283185307179586 * (turn - rint(turn)));
        cosine = cos(angle), sine = d < half ? -sin(angle) : sin(angle);
    }
    const long long other = d < half ? d + half : d - half;
    const long long to = ((b * num_heads + h) * capacity + start + t) * head_dim + d;
    store(query + index, widen(q[d]) * cosine + widen(q[other]) * sine);
    store(keys + to, widen(k[d]) * cosine + widen(k[other]) * sine);
    store(values + to, widen(v[d]));
}

// Attention of T queries (B, T, H, d) to the keys and values in the cache. Query t is
// that of token start + t. One thread, one output. The softmax is computed online: m, r
// and `sum` are always relative to the largest score so far.
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
    const long long here = start + index / dim % num_queries;
    const long long count = start + count_of(counts, b, num_queries);
    const long long first = reversed ? here : 0;
    const long long last = reversed ? count : min(here + 1, count);
    const real_t* q = query + index - d;
    const long long head = (b * num_heads + index % dim / head_dim) * capacity;

    acc_t m = MASKED_SCORE, r = 0,
          sum = 0;  // the largest score, and sums of e^(score - m)
    for (long long j = first; j < last; ++j) {
        const acc_t size = sizes ? sizes[b * capacity + j] : acc_t(1);
        if (!(size > 0)) continue;
        acc_t dot = 0;
        for (long long i = 0; i < head_dim; ++i)
            dot += widen(q[i]) * widen(keys[(head + j) * head_dim + i]);
        // If the largest score grows, multiply both sums by e^(m - top).
        const acc_t score = dot * acc_t(scale) + log(size), top = max(m, score);
        const acc_t fade = exp(m - top), p = exp(score - top);
        r = r * fade + p;
        sum = sum * fade + p * widen(values[(head + j) * head_dim + d]);
        m = top;
    }
    store(out + index, r > 0 ? sum / r : acc_t(0));
}
