// Matching: ToMe's bipartite soft matching (arXiv:2210.09461), repeated until exactly K
// groups are left.
//
// A step sorts the n groups by their last members. Here the position of a group is its
// index 0 .. n-1 in this order, not a position in the sequence. A group is even if this
// index is even. Each even group finds its most similar odd group, and the r =
// min(n - K, n / 2, step) even groups whose similarity to their partner is highest
// merge into their partners. Steps repeat until n = K. The similarity of two groups is
// the cosine of their means; each token is scaled to norm 1 before the mean is taken.
// With the Euclidean metric it is minus the squared distance of their means.
//
// A protected token is a group of its own and takes no part. `counts` includes these
// groups. K in this comment does not: K = count - protected tokens, at least 1.
//
// A root is a number that is the same for all members of a group and different in every
// other group (basic/labels.cu). After `free_tokens` and after each step,
// `number_groups` numbers the groups from these roots; these numbers are the positions.
//
// One thread computes one output. All kernels here except `match_counts` are
// elementwise. An optimized version of the elementwise kernels would not be faster, so
// the optimized implementation runs them too. `match_counts` has an optimized version.

// Write the first roots. The root of every token that may merge (a free token) is its
// own index; the root of all other tokens is -1.
// Shapes: mask, protect and out (B, N).
extern "C" __global__ void free_tokens(const bool* mask, const bool* protect,
                                       long long batch, long long num_tokens,
                                       int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const bool fixed = protect != nullptr && protect[index];
    out[index] =
        is_token(mask, index) && !fixed ? static_cast<int>(index % num_tokens) : -1;
}

// Counts of a step, the rows of `out` (3, B): the number n of groups; the number of odd
// groups, or 0 if nothing merges; and the number r of merges. `positions` (B, N) has
// the position of each token's group, or -1.
// Other shapes: mask and protect (B, N), counts (B,).
extern "C" __global__ void match_counts(const int* positions, const bool* mask,
                                        const bool* protect, const int* counts,
                                        long long batch, long long num_tokens,
                                        long long num_groups, long long step,
                                        int* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    long long groups = 0, fixed = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        groups = max(groups, positions[i] + 1ll);
        fixed += protect != nullptr && protect[i] && is_token(mask, i);
    }
    const long long wanted = max(count_of(counts, b, num_groups) - fixed, 1ll);
    const long long merges = max(min(min(groups - wanted, groups / 2), step), 0ll);
    out[b] = static_cast<int>(groups);
    out[batch + b] = static_cast<int>(merges > 0 ? groups / 2 : 0);
    out[2 * batch + b] = static_cast<int>(merges);
}

// For each token, `evens` receives the index of its group among the even groups
// (position / 2), or -1, and `odds` the index among the odd groups, or -1. If nothing
// merges, both are -1. `num_evens` is the largest possible number of even groups of any
// sequence. A sequence may have fewer: even_mask[i] is true if even group i exists,
// 2 i < n.
// Shapes: positions, evens and odds (B, N), step_counts (3, B) from `match_counts`,
// even_mask (B, num_evens).
extern "C" __global__ void match_sides(const int* positions, const int* step_counts,
                                       long long batch, long long num_tokens,
                                       long long num_evens, int* evens, int* odds,
                                       bool* even_mask) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const int position = step_counts[2 * batch + b] > 0 ? positions[index] : -1;
    evens[index] = position >= 0 && position % 2 == 0 ? position / 2 : -1;
    odds[index] = position >= 0 && position % 2 == 1 ? position / 2 : -1;
    if (i < num_evens) even_mask[b * num_evens + i] = 2 * i < step_counts[b];
}

// Roots after a step: the position of each token's group or, if that is a selected even
// group, the position of its odd partner. `partners` has the index of the partner among
// the odd groups.
// Shapes: positions and out (B, N), selected and partners (B, num_evens).
extern "C" __global__ void join_partners(const int* positions, const bool* selected,
                                         const int* partners, long long batch,
                                         long long num_tokens, long long num_evens,
                                         int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    int root = positions[index];
    const long long even = index / num_tokens * num_evens + root / 2;
    if (root >= 0 && root % 2 == 0 && root / 2 < num_evens && selected[even] &&
        partners[even] >= 0)
        root = 2 * partners[even] + 1;
    out[index] = root;
}

// Roots of all tokens, from the positions of the groups that took part. A protected
// token i gets N + i, which is the root of no other group, because positions are below
// N.
// Shapes: positions, mask and out (B, N).
extern "C" __global__ void match_roots(const int* positions, const bool* mask,
                                       long long batch, long long num_tokens,
                                       int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const int own_root = static_cast<int>(num_tokens + index % num_tokens);
    const int root = positions[index] < 0 ? own_root : positions[index];
    out[index] = is_token(mask, index) ? root : -1;
}
