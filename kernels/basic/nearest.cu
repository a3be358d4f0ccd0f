// Nearest anchors: each token joins the most similar of a sequence's K anchors.
//
// The similarity is cos(x, a), or -|x - a|^2 for Euclidean distances. One thread
// computes one output. Norms come from token_norms.cu, and `cosine` from cosine.cuh.

__device__ acc_t squared_distance(const real_t* x, const real_t* y, long long dim) {
    acc_t sum = 0;
    for (long long d = 0; d < dim; ++d)
        sum += (widen(x[d]) - widen(y[d])) * (widen(x[d]) - widen(y[d]));
    return sum;
}

// The index of the most similar of a sequence's K anchors (of equal ones, the lowest
// index), and its similarity. Padding and tokens without an anchor get -1 and
// -infinity. An anchor with a negative norm is left out. `highest_out` may be null.
// Shapes: tokens (B, N, D), norms, mask, out and highest_out (B, N), anchor_tokens
// (B, K, D), anchor_norms (B, K), counts (B,).
template <bool EUCLIDEAN>
__device__ void most_similar(const real_t* tokens, const acc_t* norms, const bool* mask,
                             const real_t* anchor_tokens, const acc_t* anchor_norms,
                             const int* counts, long long batch, long long num_tokens,
                             long long dim, long long num_groups, int* out,
                             acc_t* highest_out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const long long first_anchor = b * num_groups;  // in (B, K)
    const long long count = is_token(mask, index) ? count_of(counts, b, num_groups) : 0;
    int best = -1;
    acc_t highest = padding();
    for (long long k = 0; k < count; ++k) {
        if (anchor_norms[first_anchor + k] < 0) continue;
        const real_t *x = tokens + index * dim,
                     *anchor = anchor_tokens + (first_anchor + k) * dim;
        const acc_t similarity =
            EUCLIDEAN
                ? -squared_distance(x, anchor, dim)
                : cosine(x, anchor, norms[index], anchor_norms[first_anchor + k], dim);
        // The maximum turns a NaN into -1e30, which is finite and below any other
        // similarity.
        if (max(acc_t(MASKED_SCORE), similarity) > highest) {
            highest = max(acc_t(MASKED_SCORE), similarity);
            best = static_cast<int>(k);
        }
    }
    out[index] = best;
    if (highest_out != nullptr) highest_out[index] = highest;
}

extern "C" __global__ void nearest_anchors(const real_t* tokens, const acc_t* norms,
                                           const bool* mask,
                                           const real_t* anchor_tokens,
                                           const acc_t* anchor_norms, const int* counts,
                                           long long batch, long long num_tokens,
                                           long long dim, long long num_groups,
                                           int* out, acc_t* highest_out) {
    most_similar<false>(tokens, norms, mask, anchor_tokens, anchor_norms, counts, batch,
                        num_tokens, dim, num_groups, out, highest_out);
}

extern "C" __global__ void euclidean_anchors(
    const real_t* tokens, const acc_t* norms, const bool* mask,
    const real_t* anchor_tokens, const acc_t* anchor_norms, const int* counts,
    long long batch, long long num_tokens, long long dim, long long num_groups,
    int* out, acc_t* highest_out) {
    most_similar<true>(tokens, norms, mask, anchor_tokens, anchor_norms, counts, batch,
                       num_tokens, dim, num_groups, out, highest_out);
}

// The scores that select the default anchors: protected tokens (+infinity) first, then
// the tokens of largest norm. The minimum limits a norm, also an infinite one or a NaN,
// to 1e30 (-MASKED_SCORE), so that protected tokens stay first. Padding scores
// -infinity.
// Shapes: all arrays (B, N).
extern "C" __global__ void anchor_scores(const acc_t* norms, const bool* mask,
                                         const bool* protect, long long num_elements,
                                         acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= num_elements) return;
    const bool fixed = protect != nullptr && protect[index];
    const acc_t score = fixed ? -padding() : min(acc_t(-MASKED_SCORE), norms[index]);
    out[index] = is_token(mask, index) ? score : padding();
}

// Whether each token is one of the first K anchors, whose positions may have any order.
// Shapes: anchor_positions (B, K), mask and out (B, N), counts (B,).
extern "C" __global__ void mark_anchors(const int* anchor_positions, const bool* mask,
                                        const int* counts, long long batch,
                                        long long num_tokens, long long num_groups,
                                        bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const long long count = is_token(mask, index) ? count_of(counts, b, num_groups) : 0;
    bool is_anchor = false;
    for (long long k = 0; k < count; ++k)
        is_anchor = is_anchor || anchor_positions[b * num_groups + k] == i;
    out[index] = is_anchor;
}

// The norms of the anchors that other tokens may join. Entries without an anchor and
// protected anchors get -1, so `nearest_anchors` leaves them out.
// Shapes: anchor_positions and out (B, K), norms and protect (B, N).
extern "C" __global__ void open_anchors(const int* anchor_positions, const acc_t* norms,
                                        const bool* protect, long long batch,
                                        long long num_tokens, long long num_groups,
                                        acc_t* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const int i = group_of(anchor_positions[index], num_tokens);
    const long long token = index / num_groups * num_tokens + i;
    const bool open = i >= 0 && !(protect != nullptr && protect[token]);
    out[index] = open ? norms[token] : acc_t(-1);
}

// The root of each token's group: the position of its nearest anchor, or its own
// position if it is an anchor, is protected, or has no anchor to join. -1 for padding.
// Shapes: nearest (from `nearest_anchors`), is_anchor (from `mark_anchors`), mask,
// protect and out (B, N), anchor_positions (B, K).
extern "C" __global__ void join_anchors(const int* nearest, const int* anchor_positions,
                                        const bool* is_anchor, const bool* mask,
                                        const bool* protect, long long batch,
                                        long long num_tokens, long long num_groups,
                                        int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const int k = group_of(nearest[index], num_groups);
    int root = static_cast<int>(index % num_tokens);
    if (!is_anchor[index] && !(protect != nullptr && protect[index]) && k >= 0)
        root = anchor_positions[b * num_groups + k];
    out[index] = is_token(mask, index) ? root : -1;
}
