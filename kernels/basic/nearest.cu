// Nearest anchors: each token joins the most similar of a sequence's K anchors.
//
// One thread, one output. Norms come from token_norms.cu.

// The most similar of a sequence's K anchors, of equal ones the lowest, and how
// similar; -1 and -infinity for padding, and without an anchor. Anchors of negative
// norm are none.
extern "C" __global__ void nearest_anchors(const real_t* tokens, const acc_t* norms,
                                           const bool* mask, const real_t* anchors,
                                           const acc_t* anchor_norms, const int* counts,
                                           long long batch, long long num_tokens,
                                           long long dim, long long num_groups,
                                           int* out, acc_t* highest_out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const long long first = b * num_groups;  // anchor of (B, K)
    const long long count = is_token(mask, index) ? count_of(counts, b, num_groups) : 0;
    int best = -1;
    acc_t highest = padding();
    for (long long k = 0; k < count; ++k) {
        if (anchor_norms[first + k] < 0) continue;
        const acc_t similarity =
            cosine(tokens + index * dim, anchors + (first + k) * dim, norms[index],
                   anchor_norms[first + k], dim);
        // What is not a number is less similar than all that is.
        if (max(acc_t(MASKED_SCORE), similarity) > highest) {
            highest = max(acc_t(MASKED_SCORE), similarity);
            best = static_cast<int>(k);
        }
    }
    out[index] = best;
    if (highest_out != nullptr) highest_out[index] = highest;
}

// The scores of the default anchors: protected tokens, then those of largest norm.
extern "C" __global__ void anchor_scores(const acc_t* norms, const bool* mask,
                                         const bool* protect, long long count,
                                         acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= count) return;
    const bool fixed = protect != nullptr && protect[index];
    const acc_t score = fixed ? -padding() : min(acc_t(-MASKED_SCORE), norms[index]);
    out[index] = is_token(mask, index) ? score : padding();
}

// Whether a token is one of the first K anchors, which are positions in any order.
extern "C" __global__ void mark_anchors(const int* anchors, const bool* mask,
                                        const int* counts, long long batch,
                                        long long num_tokens, long long num_groups,
                                        bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const long long count = is_token(mask, index) ? count_of(counts, b, num_groups) : 0;
    bool found = false;
    for (long long k = 0; k < count; ++k)
        found = found || anchors[b * num_groups + k] == i;
    out[index] = found;
}

// The norms of the anchors that others may join: those that exist, and are not
// protected. That of the others is -1.
extern "C" __global__ void open_anchors(const int* anchors, const acc_t* norms,
                                        const bool* protect, long long batch,
                                        long long num_tokens, long long num_groups,
                                        acc_t* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const int i = group_of(anchors[index], num_tokens);
    const long long token = index / num_groups * num_tokens + i;
    const bool open = i >= 0 && !(protect != nullptr && protect[token]);
    out[index] = open ? norms[token] : acc_t(-1);
}

// The position that names each token's group: its nearest anchor's, or its own if it is
// an anchor or protected, or has none to join.
extern "C" __global__ void join_anchors(const int* nearest, const int* anchors,
                                        const bool* chosen, const bool* mask,
                                        const bool* protect, long long batch,
                                        long long num_tokens, long long num_groups,
                                        int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens;
    const int k = group_of(nearest[index], num_groups);
    int root = static_cast<int>(index % num_tokens);
    if (!chosen[index] && !(protect != nullptr && protect[index]) && k >= 0)
        root = anchors[b * num_groups + k];
    out[index] = is_token(mask, index) ? root : -1;
}
