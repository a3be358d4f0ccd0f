// Contiguous groups: merge the two neighbours that add least to the squared error,
// until K groups are left, never across a protected token. Two neighbouring groups a
// and b, of n_a and n_b unit tokens with sums S_a and S_b, have Ward's cost:
//
//   n_a n_b / (n_a + n_b) (|S_a|^2 / n_a^2 + |S_b|^2 / n_b^2 - 2 S_a . S_b / (n_a n_b))
//
// A zero token counts as a unit vector orthogonal to all others. Of equal costs the
// leftmost pair merges first. Merges must be made one by one, because a merge may bring
// its neighbours nearer.

// The groups of a sequence, at the indices of their first members; arrays (N,).
struct Groups {
    const bool* protect;
    acc_t *cost, *square, *size;  // cost: of merging with the next; size 0: no group
    int *left, *right;            // the neighbours' first members
};

__device__ acc_t dot(const real_t* x, const real_t* y, long long dim) {
    acc_t sum = 0;
    for (long long d = 0; d < dim; ++d) sum += widen(x[d]) * widen(y[d]);
    return sum;
}

// Ward's cost. It is infinite if one group is protected. The minimum turns a NaN into a
// finite cost above any other.
__device__ acc_t ward_cost(const Groups& g, long long a, long long b, acc_t product) {
    if (g.protect != nullptr && (g.protect[a] || g.protect[b])) return -padding();
    const acc_t m = g.size[a], n = g.size[b];
    const acc_t gap =
        g.square[a] / (m * m) + g.square[b] / (n * n) - 2 * product / (m * n);
    return min(acc_t(-MASKED_SCORE), m * n / (m + n) * gap);
}

// `sums` (B, N, D) holds unit tokens and is overwritten. One thread merges one
// sequence.
extern "C" __global__ void contiguous_groups(real_t* sums, const bool* mask,
                                             const bool* protect, const int* counts,
                                             long long batch, long long num_tokens,
                                             long long dim, long long num_groups,
                                             acc_t* reals, int* links, int* out) {
    const long long sequence = thread_index();  // (B,)
    if (sequence >= batch) return;
    const long long row = sequence * num_tokens;  // of (B, N)
    real_t* sum = sums + row * dim;               // (N, D)
    acc_t* real = reals + BASIC_CONTIGUOUS_REALS * row;
    const Groups g = {protect ? protect + row : nullptr,
                      real,
                      real + num_tokens,
                      real + 2 * num_tokens,
                      links + BASIC_CONTIGUOUS_INTEGERS * row,
                      links + BASIC_CONTIGUOUS_INTEGERS * row + num_tokens};
    const auto cost = [&](long long a, long long b) {
        return ward_cost(g, a, b, dot(sum + a * dim, sum + b * dim, dim));
    };
    // Make each token a group, linked with its neighbours across padding.
    long long merges = -count_of(counts, sequence, num_groups), last = -1;
    for (long long i = 0; i < num_tokens; ++i) {
        const bool token = is_token(mask, row + i);
        g.cost[i] = -padding(), g.square[i] = 1, g.size[i] = token;
        g.left[i] = static_cast<int>(last), g.right[i] = static_cast<int>(num_tokens);
        if (!token) continue;
        if (last >= 0) {
            g.right[last] = static_cast<int>(i);
            g.cost[last] = cost(last, i);
        }
        last = i;
        ++merges;
    }
    for (; merges > 0; --merges) {
        // Select the cheapest pair a, b; the strict comparison selects the leftmost.
        long long a = 0;
        for (long long i = 1; i < num_tokens; ++i)
            if (g.cost[i] < g.cost[a]) a = i;
        if (g.cost[a] == -padding())
            break;  // only pairs with a protected token are left
        const long long b = g.right[a], after = g.right[b], before = g.left[a];
        // |S_a + S_b|^2 = |S_a|^2 + |S_b|^2 + 2 S_a . S_b
        g.square[a] += g.square[b] + 2 * dot(sum + a * dim, sum + b * dim, dim);
        for (long long d = 0; d < dim; ++d)
            store(sum + a * dim + d, widen(sum[a * dim + d]) + widen(sum[b * dim + d]));
        g.size[a] += g.size[b];
        g.size[b] = 0, g.cost[b] = -padding();
        g.right[a] = static_cast<int>(after);
        if (after < num_tokens) g.left[after] = static_cast<int>(a);
        // Only the two pairs that contain the new group change their costs.
        g.cost[a] = after < num_tokens ? cost(a, after) : -padding();
        if (before >= 0) g.cost[before] = cost(before, a);
    }
    int group = -1;
    for (long long i = 0; i < num_tokens; ++i) {
        group += g.size[i] > 0;
        out[row + i] = is_token(mask, row + i) ? group : -1;
    }
}
