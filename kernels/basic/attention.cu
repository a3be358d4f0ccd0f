// The transformer prior: what its layers do between their linear maps, which `linear`
// in linear.cu does.
//
//   x += W_o attend(heads(W_qkv norm(x)))     x += W_2 gelu(W_1 norm(x))
//
//   attend  = sum_j p_ij v_j,  p_i = softmax_j(q_i . k_j scale + log size_j)
//
// Token i attends to tokens j <= i, or, in reverse, to j >= i; a token that stands for
// `size` others attracts as much as they would have, and one of size 0 not at all.

// From heads (B, T, 3, H, d) the queries (B, T, H, d), and keys and values, which go to
// rows `start` onwards of (B, H, capacity, d). With `turns` (d / 2) queries and keys
// are rotated (Su et al. 2021, arXiv:2104.09864): elements i and i + d / 2 by position
// * turns_i of a full turn. Without `positions` (B, T) the position is start + t.
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

// Of T queries (B, T, H, d) the t-th is that of token start + t.
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
        const acc_t score = dot * acc_t(scale) + log(size), top = max(m, score);
        const acc_t fade = exp(m - top), p = exp(score - top);
        r = r * fade + p;
        sum = sum * fade + p * widen(values[(head + j) * head_dim + d]);
        m = top;
    }
    store(out + index, r > 0 ? sum / r : acc_t(0));
}
