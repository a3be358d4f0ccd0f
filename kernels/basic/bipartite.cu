// Matching: ToMe's bipartite soft matching (arXiv:2210.09461), repeated until exactly
// K.
//
// n groups stand in the order of their last members at places 0 .. n-1. Of the even
// places the r = min(n - K, n / 2) most similar to an odd one merge into it, and again
// until n = K. A group's direction is the mean of its unit tokens. K leaves out the
// protected tokens, which are groups of their own and take no part.
//
// One thread, one output. What is elementwise has nothing to gain: optimized runs it
// from here.

// A root for every token that may merge: itself; -1 for the others.
extern "C" __global__ void free_tokens(const bool* mask, const bool* protect,
                                       long long batch, long long num_tokens,
                                       int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const bool fixed = protect != nullptr && protect[index];
    out[index] =
        is_token(mask, index) && !fixed ? static_cast<int>(index % num_tokens) : -1;
}

// out (3, B) = n, the odd places that the even ones are held against, and r.
extern "C" __global__ void match_counts(const int* places, const bool* mask,
                                        const bool* protect, const int* counts,
                                        long long batch, long long num_tokens,
                                        long long num_groups, int* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    long long groups = 0, fixed = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        groups = max(groups, places[i] + 1ll);
        fixed += protect != nullptr && protect[i] && is_token(mask, i);
    }
    const long long wanted = max(count_of(counts, b, num_groups) - fixed, 1ll);
    const long long merges = max(min(groups - wanted, groups / 2), 0ll);
    out[b] = static_cast<int>(groups);
    out[batch + b] = static_cast<int>(merges > 0 ? groups / 2 : 0);
    out[2 * batch + b] = static_cast<int>(merges);
}

// Labels of the groups at even places and of those at odd ones, and which even places
// of `num_evens` there are. Nothing is labelled where nothing merges.
extern "C" __global__ void match_sides(const int* places, const int* sizes,
                                       long long batch, long long num_tokens,
                                       long long num_evens, int* evens, int* odds,
                                       bool* even_mask) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const int place = sizes[2 * batch + b] > 0 ? places[index] : -1;
    evens[index] = place >= 0 && place % 2 == 0 ? place / 2 : -1;
    odds[index] = place >= 0 && place % 2 == 1 ? place / 2 : -1;
    if (i < num_evens) even_mask[b * num_evens + i] = 2 * i < sizes[b];
}

// Roots after a step: the chosen even groups take the odd one they are most similar to.
extern "C" __global__ void join_partners(const int* places, const bool* chosen,
                                         const int* partners, long long batch,
                                         long long num_tokens, long long num_evens,
                                         int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    int root = places[index];
    const long long even = index / num_tokens * num_evens + root / 2;
    if (root >= 0 && root % 2 == 0 && root / 2 < num_evens && chosen[even] &&
        partners[even] >= 0)
        root = 2 * partners[even] + 1;
    out[index] = root;
}

// Roots of all tokens, from the places of those that are not protected.
extern "C" __global__ void match_roots(const int* places, const bool* mask,
                                       long long batch, long long num_tokens,
                                       int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const int own = static_cast<int>(num_tokens + index % num_tokens);
    const int root = places[index] < 0 ? own : places[index];
    out[index] = is_token(mask, index) ? root : -1;
}
