// Contiguous groups: merge the two neighbours that add least to the squared error,
// until K groups are left, never across a protected token. With `max_distance`, merging
// also stops if the distance sqrt(2 cost) of the cheapest pair is above it. Two
// neighbouring groups a and b, of n_a and n_b vectors with sums S_a and S_b, have
// Ward's cost:
//
//   n_a n_b / (n_a + n_b) (|S_a|^2 / n_a^2 + |S_b|^2 / n_b^2 - 2 S_a . S_b / (n_a n_b))
//
// The vectors are unit tokens (a zero token counts as a unit vector orthogonal to all
// others), or tokens if `euclidean`. Of equal costs the leftmost pair merges first.
// Merges are made one by one, because a merge can bring the new group nearer to its
// neighbours.

// The groups of one sequence. Entry i of each array (N,) describes the group whose
// first member is token i. `cost` is the cost of a merge with the next group, and
// `square` is |S|^2. If `size` is 0, there is no such group.
struct Groups {
    const bool* protect;
    acc_t *cost, *square, *size;
    int *left, *right;  // first members of the neighbours
};

__device__ acc_t dot(const real_t* x, const real_t* y, long long dim) {
    acc_t sum = 0;
    for (long long d = 0; d < dim; ++d) sum += widen(x[d]) * widen(y[d]);
    return sum;
}

// Ward's cost of groups a and b; `product` is S_a . S_b. The cost is infinite
// (-padding()) if one group is protected. The minimum turns a NaN into 1e30
// (-MASKED_SCORE), which is finite and above every other cost.
__device__ acc_t ward_cost(const Groups& g, long long a, long long b, acc_t product) {
    if (g.protect != nullptr && (g.protect[a] || g.protect[b])) return -padding();
    const acc_t size_a = g.size[a], size_b = g.size[b];
    const acc_t squared_gap = g.square[a] / (size_a * size_a) +
                              g.square[b] / (size_b * size_b) -
                              2 * product / (size_a * size_b);
    return min(acc_t(-MASKED_SCORE), size_a * size_b / (size_a + size_b) * squared_gap);
}

// Whether the distance sqrt(2 cost) of neighbours a and b is at most `max_distance`. A
// gap of their means that may come from rounding alone counts as 0. No finite distance
// is as large as that of a pair whose cost is not known (-MASKED_SCORE).
__device__ bool within_distance(const Groups& g, long long a, long long b,
                                double max_distance) {
    // Rounding errors of sums grow with their length.
    constexpr acc_t EPSILON = sizeof(acc_t) == 4 ? acc_t(0x1p-23) : acc_t(0x1p-52);
    const acc_t size_a = g.size[a], size_b = g.size[b], cost = g.cost[a];
    const acc_t squared_gap = cost * (size_a + size_b) / (size_a * size_b);
    const acc_t squares =
        g.square[a] / (size_a * size_a) + g.square[b] / (size_b * size_b);
    if (squared_gap < max(NOISE, (size_a + size_b) * EPSILON) * squares) return true;
    return cost < -MASKED_SCORE ? sqrt(2 * double(max(cost, acc_t(0)))) <= max_distance
                                : max_distance == -padding();
}

// One thread merges one sequence. `sums` (B, N, D) holds the vectors and is
// overwritten. Other shapes: mask, protect and out (B, N), counts (B,). The groups are
// in `reals` (B, 3N) and `links` (B, 2N). A negative `max_distance` is ignored.
extern "C" __global__ void contiguous_groups(real_t* sums, const bool* mask,
                                             const bool* protect, const int* counts,
                                             long long batch, long long num_tokens,
                                             long long dim, long long num_groups,
                                             double max_distance, long long euclidean,
                                             acc_t* reals, int* links, int* out) {
    const long long sequence = thread_index();  // (B,)
    if (sequence >= batch) return;
    const long long sequence_start = sequence * num_tokens;  // in (B, N)
    real_t* sequence_sums = sums + sequence_start * dim;     // (N, D)
    acc_t* sequence_reals = reals + BASIC_CONTIGUOUS_REALS * sequence_start;
    const Groups g = {protect ? protect + sequence_start : nullptr,
                      sequence_reals,
                      sequence_reals + num_tokens,
                      sequence_reals + 2 * num_tokens,
                      links + BASIC_CONTIGUOUS_INTEGERS * sequence_start,
                      links + BASIC_CONTIGUOUS_INTEGERS * sequence_start + num_tokens};
    const auto cost = [&](long long a, long long b) {
        return ward_cost(g, a, b,
                         dot(sequence_sums + a * dim, sequence_sums + b * dim, dim));
    };
    // Make each token a group, linked with its neighbours across padding. `merges`
    // becomes n - K, the number of merges for n tokens.
    long long merges = -count_of(counts, sequence, num_groups), previous = -1;
    for (long long i = 0; i < num_tokens; ++i) {
        const bool valid = is_token(mask, sequence_start + i);
        const real_t* x = sequence_sums + i * dim;
        g.cost[i] = -padding(), g.size[i] = valid;
        g.square[i] = euclidean ? dot(x, x, dim) : acc_t(1);
        g.left[i] = static_cast<int>(previous),
        g.right[i] = static_cast<int>(num_tokens);
        if (!valid) continue;
        if (previous >= 0) {
            g.right[previous] = static_cast<int>(i);
            g.cost[previous] = cost(previous, i);
        }
        previous = i;
        ++merges;
    }
    for (; merges > 0; --merges) {
        // Select the cheapest pair a, b. The strict comparison selects the leftmost
        // one.
        long long a = 0;
        for (long long i = 1; i < num_tokens; ++i)
            if (g.cost[i] < g.cost[a]) a = i;
        if (g.cost[a] == -padding())
            break;  // every pair that is left has a protected token
        const long long b = g.right[a], after = g.right[b], before = g.left[a];
        if (max_distance >= 0 && !within_distance(g, a, b, max_distance)) break;
        // |S_a + S_b|^2 = |S_a|^2 + |S_b|^2 + 2 S_a . S_b
        g.square[a] += g.square[b] +
                       2 * dot(sequence_sums + a * dim, sequence_sums + b * dim, dim);
        for (long long d = 0; d < dim; ++d)
            store(sequence_sums + a * dim + d, widen(sequence_sums[a * dim + d]) +
                                                   widen(sequence_sums[b * dim + d]));
        g.size[a] += g.size[b];
        g.size[b] = 0, g.cost[b] = -padding();
        g.right[a] = static_cast<int>(after);
        if (after < num_tokens) g.left[after] = static_cast<int>(a);
        // Only the two pairs that contain the new group change their costs.
        g.cost[a] = after < num_tokens ? cost(a, after) : -padding();
        if (before >= 0) g.cost[before] = cost(before, a);
    }
    // Number the groups from left to right, and label their members.
    int group = -1;
    for (long long i = 0; i < num_tokens; ++i) {
        group += g.size[i] > 0;
        out[sequence_start + i] = is_token(mask, sequence_start + i) ? group : -1;
    }
}
