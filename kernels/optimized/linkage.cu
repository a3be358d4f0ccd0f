// Average, complete and ward linkage by rounds of reciprocal nearest neighbours: every
// two clusters that are each other's nearest merge, in the same round. For these three
// distances a merge never brings the new cluster nearer to a third one than its parts
// were, so this is the dendrogram that the closest pair after the closest pair gives.
//
//   E(A, C) = sum of m_a m_c (1 - cos)      adds up:  E(A u B, C) = E(A, C) + E(B, C)
//   average   E / (W_A W_C)                 W: the mass, of a token 1 or m
//   complete  the largest 1 - cos           in the place of the sum
//   ward      2 W_A W_C / (W_A + W_C) |mu_A - mu_C|^2, of which the height is the root
//   |mu_A - mu_C|^2 = 2 E(A, C) / (W_A W_C) - E(A, A) / W_A^2 - E(C, C) / W_C^2
//
// A cluster lives in the slot (row and column) of its first token. Several blocks share
// a sequence. Each keeps the clusters for itself and plans every round as all others
// do, so blocks meet once a round, to tell the nearest clusters that they have found.
// Rows where little has changed take a warp; those that are searched anew take a block.

constexpr int COMPLETE = 1, WARD = 2;         // 0: average
constexpr int UNTOUCHED = -1, ABSORBED = -2;  // else: the slot that this one absorbs
constexpr int AHEAD = 4, READ = 8;  // loads in flight: of rows, of what was found

// A cluster, as every row asks for it.
struct __align__(16) Slot {
    acc_t weight;           // W
    acc_t inverse, spread;  // 1 / W, and E(A, A) / W^2
    int mate;               // the slot that it absorbs in this round
};

// The nearest cluster of a slot, and E with it.
struct Found {
    acc_t sum;
    int slot;
};

struct Merge {
    int left, right, tokens;  // the nodes it joins
};

__device__ __forceinline__ acc_t distance(acc_t e, const Slot& a, const Slot& b,
                                          int method) {
    if (method == COMPLETE) return e;
    const acc_t mean = e * (a.inverse * b.inverse);
    if (method != WARD) return mean;
    const acc_t gap = 2 * mean - (a.spread + b.spread);
    return (gap < 0 ? acc_t(0) : gap) * 2 / (a.inverse + b.inverse);  // keeps a NaN
}

// The clusters of a sequence: a copy for each block, in the order it lies in. Lists are
// found when they are asked for: pointers to all of them would take too many registers.
struct Clusters {
    unsigned char* state;
    int num_tokens;
    int turn;  // which of two lists is `active`

    __device__ Slot* slot() const { return reinterpret_cast<Slot*>(state); }  // (N,)
    __device__ int* nearest() const {                                         // (N,)
        return reinterpret_cast<int*>(slot() + num_tokens);
    }
    // (N,) the slots there are, and room for those after this round.
    __device__ int* active() const { return list(turn); }
    __device__ int* next() const { return list(1 - turn); }
    __device__ int* searched() const { return list(2); }  // (N,) that are searched anew
    __device__ int* joined() const { return list(3); }    // (N / 2,) that are new

    // Of each token, 1 / |x|: before the first round, which needs no list but one.
    __device__ acc_t* scale() const { return reinterpret_cast<acc_t*>(list(1)); }

    __device__ int* list(int k) const { return nearest() + (1 + k) * num_tokens; }
};

// The node of a cluster in the dendrogram.
struct Node {
    acc_t height;  // no lower than those of its parts
    int number;    // below N: a token
    int tokens;
};

// What becomes the dendrogram of a sequence, by its first block.
struct Tree {
    unsigned char* data;
    int num_tokens;

    __device__ Node* node() const { return reinterpret_cast<Node*>(data); }  // (N,)
    __device__ acc_t* height() const {  // (N,) of merge t, before the root
        return reinterpret_cast<acc_t*>(node() + num_tokens);
    }
    __device__ Merge* merge() const {  // (N,)
        return reinterpret_cast<Merge*>(height() + num_tokens);
    }
};

// Where a sequence stands, the same in all threads of all blocks.
struct Progress {
    int clusters, joined, searched;  // how many there are, are new, are searched anew
    int made, wanted;                // merges
    int rounds;
    bool done;
};

// Distances are compared without their last bits, which rounding alone decides.
__device__ __forceinline__ float compared(float x) {
    return __uint_as_float((__float_as_uint(x) + 4) & ~7u);
}
__device__ __forceinline__ double compared(double x) {
    return __longlong_as_double((__double_as_longlong(x) + 4) & ~7ll);
}

__device__ __forceinline__ Neighbour candidate(acc_t e, const Slot& own, int j,
                                               const Slot& other, int method) {
    const acc_t exact = distance(e, own, other, method);
    return {compared(exact), e, exact >= 0 ? j : -1};  // no NaN, whose bits may wrap
}

__device__ __forceinline__ acc_t join(acc_t x, acc_t y, int method) {
    return method == COMPLETE ? max(x, y) : x + y;
}

// How many of each kind there are up to a thread: three counts in one number, of 21
// bits each, so that one pass sums all three.
struct Counts {
    unsigned long long packed;

    __device__ void add(bool kept, bool joined, bool searched) {
        packed += kept | (unsigned long long)joined << 21 |
                  (unsigned long long)searched << 42;
    }
    __device__ int kept() const { return packed & 0x1FFFFF; }
    __device__ int joined() const { return packed >> 21 & 0x1FFFFF; }
    __device__ int searched() const { return static_cast<int>(packed >> 42); }
};

// The counts of all threads before this one; `total` becomes those of all.
__device__ __forceinline__ Counts counts_before(Counts own, unsigned long long* scratch,
                                                Counts* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    unsigned long long sum = own.packed;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long before = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += before;
    }
    __syncthreads();  // the scratch may still be in use
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    unsigned long long all = lane < warps ? scratch[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long before = __shfl_up_sync(~0u, all, step);
        if (lane >= step) all += before;
    }
    total->packed = __shfl_sync(~0u, all, 31);
    const unsigned long long earlier = __shfl_sync(~0u, all, max(warp - 1, 0));
    return {sum - own.packed + (warp > 0 ? earlier : 0)};
}

// Set up the clusters, of one token each; `unit` becomes the mass that counts as 1.
// Called, not in line: it would take registers from the rounds.
__device__ __noinline__ Progress begin(Clusters& all, const Tree& tree, bool first,
                                       const acc_t* cosines, const acc_t* mass,
                                       const bool* mask, const bool* protect,
                                       long long num_tokens, long long num_groups,
                                       acc_t* scratch, acc_t* unit) {
    acc_t top = 0;
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i])) top = max(top, mass[i]);
    top = block_reduce(top, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        // So that a token of no mass still joins its nearest.
        const acc_t weight = top > 0 ? max(mass[i] / top, acc_t(1e-6)) : acc_t(1);
        all.slot()[i] = {weight, 1 / weight, 0, UNTOUCHED};
        all.scale()[i] = inverse_length(cosines[i * num_tokens + i]);
        if (!first) continue;
        tree.node()[i] = {0, static_cast<int>(i), 1};
    }
    int tokens;
    const int clusters =
        list_tokens(mask, protect, num_tokens, reinterpret_cast<int*>(scratch),
                    all.active(), &tokens);
    *unit = top > 0 ? top : acc_t(1);
    const long long wanted = min(tokens - num_groups, clusters - 1ll);
    __syncthreads();
    return {clusters, 0, 0, 0, static_cast<int>(wanted), 0, wanted <= 0};
}

// Whether row i needs every column: it is a new cluster, or its nearest is no more.
__device__ __forceinline__ bool is_searched(const Clusters& all, int i) {
    const int nearest = all.nearest()[i];
    return all.slot()[i].mate >= 0 || nearest < 0 ||
           all.slot()[nearest].mate != UNTOUCHED;
}

// Merge all pairs that are each other's nearest, until the lowest `wanted` merges are
// made: those that come are no lower than the closest pair there is now.
__device__ void plan_round(Clusters& all, const Tree& tree, bool first,
                           const Found* found, Progress& now, long long num_tokens,
                           int method, acc_t* scratch) {
    acc_t least = -NEVER, lower = 0;
    const bool enough = now.made >= now.wanted;
    const int threads = blockDim.x;
    for (int p0 = threadIdx.x; p0 < now.clusters; p0 += threads * READ) {
        Found own[READ];  // all loads before the first store, which they could not pass
#pragma unroll
        for (int k = 0; k < READ; ++k)
            own[k] = found[all.active()[min(p0 + threads * k, now.clusters - 1)]];
#pragma unroll
        for (int k = 0; k < READ; ++k) {
            if (p0 + threads * k >= now.clusters) break;
            const int i = all.active()[p0 + threads * k], j = own[k].slot;
            all.nearest()[i] = j;
            if (enough && j >= 0)
                least = min(least,
                            distance(own[k].sum, all.slot()[i], all.slot()[j], method));
        }
    }
    if (enough) {
        least = block_reduce(least, scratch, Least());
        for (int t = threadIdx.x; t < now.made; t += blockDim.x)
            lower += compared(tree.height()[t]) <= compared(least);
        lower = block_reduce(lower, scratch, Add());
        if (lower >= now.wanted) {
            now.done = true;
            return;
        }
    }
    __syncthreads();
    for (int p = threadIdx.x; p < now.clusters; p += blockDim.x) {
        const int i = all.active()[p], j = all.nearest()[i];
        const bool pair = j >= 0 && all.nearest()[j] == i;
        all.slot()[i].mate = !pair ? UNTOUCHED : i < j ? j : ABSORBED;
    }
    __syncthreads();
    const int share = (now.clusters + threads - 1) / threads;  // of a thread
    const int begin = min(static_cast<int>(threadIdx.x) * share, now.clusters);
    const int end = min(begin + share, now.clusters);
    Counts own = {0}, total;
    for (int p = begin; p < end; ++p) {
        const int i = all.active()[p], mate = all.slot()[i].mate;
        const bool kept = mate != ABSORBED;
        own.add(kept, mate >= 0, kept && is_searched(all, i));
    }
    auto* sums = reinterpret_cast<unsigned long long*>(scratch);
    Counts place = counts_before(own, sums, &total);
    for (int p = begin; p < end; ++p) {
        const int i = all.active()[p], j = all.slot()[i].mate;
        if (j == ABSORBED) continue;
        all.next()[place.kept()] = i;
        const bool searched = is_searched(all, i);
        if (searched) all.searched()[place.searched()] = i;
        if (j >= 0) {
            const int t = now.made + place.joined();
            all.joined()[place.joined()] = i;
            Slot& a = all.slot()[i];
            const Slot b = all.slot()[j];
            const acc_t sum = found[i].sum, weight = a.weight + b.weight;
            const acc_t within =
                a.spread * a.weight * a.weight + b.spread * b.weight * b.weight;
            if (first) {  // loads first, because no store may be passed
                const Node left = tree.node()[i], right = tree.node()[j];
                const acc_t height =
                    max(distance(sum, a, b, method), max(left.height, right.height));
                const int tokens = left.tokens + right.tokens;
                tree.node()[i] = {height, static_cast<int>(num_tokens) + t, tokens};
                tree.height()[t] = height;
                tree.merge()[t] = {left.number, right.number, tokens};
            }
            a.spread = (within + 2 * sum) / (weight * weight);
            a.inverse = 1 / weight;
            a.weight = weight;
        }
        place.add(true, j >= 0, searched);
    }
    all.turn = 1 - all.turn;
    now.clusters = total.kept();
    now.joined = total.joined();
    now.searched = total.searched();
    now.made += now.joined;
    now.rounds += 1;
    now.done = now.joined == 0;
    __syncthreads();
}

// Keep the nearest cluster that any of the `lanes` at row i has found; -1 is no row.
__device__ __forceinline__ void keep_nearest(Found* next, int i, Neighbour best,
                                             int lanes = 32) {
    best = warp_nearest(i, best, lanes);
    if (i >= 0 && threadIdx.x % lanes == 0) next[i] = {best.sum, best.slot};
}

// One warp: E of row i with all clusters, from cosines, and its nearest one.
__device__ void first_row(const Clusters& all, const acc_t* cosines, acc_t* row, int i,
                          int clusters, int method, Found* next) {
    const Slot own = all.slot()[i];
    const acc_t scale = all.scale()[i];
    Neighbour best = {0, 0, -1};
    if (row != cosines && threadIdx.x % 32 == 0) row[i] = 0;  // loaded and dropped
    for (int p0 = threadIdx.x % 32; p0 < clusters; p0 += 32 * AHEAD) {
        int column[AHEAD];
        acc_t e[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            column[k] = p0 + 32 * k < clusters ? all.active()[p0 + 32 * k] : i;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            e[k] = cosine_distance(cosines[j] * (scale * all.scale()[j])) *
                   (own.weight * all.slot()[j].weight);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            if (j == i) continue;
            row[j] = e[k];
            const Neighbour found = candidate(e[k], own, j, all.slot()[j], method);
            if (nearer(i, found, best)) best = found;
        }
    }
    keep_nearest(next, i, best);
}

// Bring row i up to date with this round's merges, in every `step`-th of the columns
// from `start`; return the nearest cluster among them and `best`.
__device__ __forceinline__ Neighbour next_row(const Clusters& all, acc_t* matrix, int i,
                                              const int* columns, int count, int start,
                                              int step, long long num_tokens,
                                              int method, Neighbour best) {
    acc_t* row = matrix + i * num_tokens;
    const Slot own = all.slot()[i];
    const acc_t* absorbed = own.mate < 0 ? nullptr : matrix + own.mate * num_tokens;
    for (int p0 = start; p0 < count; p0 += step * AHEAD) {
        // All loads come before the first store, which they could not pass.
        int column[AHEAD], mate[AHEAD];
        acc_t e[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int p = p0 + step * k;
            column[k] = p < count ? columns[p] : i;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            mate[k] = column[k] == i ? UNTOUCHED : all.slot()[column[k]].mate;
            e[k] = row[column[k]];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            // In this order, so that row j finds the same: the sums commute.
            if (absorbed && mate[k] >= 0)
                e[k] = join(join(e[k], absorbed[mate[k]], method),
                            join(row[mate[k]], absorbed[j], method), method);
            else if (absorbed)
                e[k] = join(e[k], absorbed[j], method);
            else if (mate[k] >= 0)
                e[k] = join(e[k], row[mate[k]], method);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            if (j == i) continue;
            if (absorbed || mate[k] >= 0) row[j] = e[k];
            const Neighbour found = candidate(e[k], own, j, all.slot()[j], method);
            if (nearer(i, found, best)) best = found;
        }
    }
    return best;
}

// Bring every row up to date. `block` of `blocks` has rows of its own; a row's nearest
// cluster goes from `found` to `next`.
__device__ void next_rows(const Clusters& all, acc_t* matrix, const Progress& now,
                          int block, int blocks, const Found* found, Found* next,
                          long long num_tokens, int method, Neighbour* scratch) {
    const Neighbour none = {0, 0, -1};
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32, warps = blockDim.x / 32;
    // Rows that are searched, first: they take longest. Where a block has fewer of them
    // than warps, several warps share the columns of one.
    const int turns = (now.searched + blocks - 1) / blocks;
    const int parts = min(warps / max(turns, 1), (now.clusters + 127) / 128);
    if (parts > 1) {
        const int q = own / parts * blocks + block, part = own % parts;
        const int i = q < now.searched ? all.searched()[q] : -1;
        if (i >= 0) {
            Neighbour best =
                next_row(all, matrix, i, all.active(), now.clusters, part * 32 + lane,
                         parts * 32, num_tokens, method, none);
            best = warp_nearest(i, best);
            if (lane == 0) scratch[own] = best;
        }
        __syncthreads();
        if (i >= 0 && part == 0) {
            keep_nearest(next, i, lane < parts ? scratch[own + lane] : none);
        }
    }
    const int warp = own * blocks + block;
    for (int q = warp; parts <= 1 && q < now.searched; q += blocks * warps) {
        const int i = all.searched()[q];
        keep_nearest(next, i,
                     next_row(all, matrix, i, all.active(), now.clusters, lane, 32,
                              num_tokens, method, none));
    }
    // As many lanes at a row as have a new cluster to look at.
    int lanes = 1;
    while (lanes < 32 && lanes * AHEAD < now.joined) lanes *= 2;
    const int rows = 32 / lanes;
    for (int p0 = warp * rows; p0 < now.clusters; p0 += blocks * warps * rows) {
        const int p = p0 + lane / lanes, i = p < now.clusters ? all.active()[p] : -1;
        const bool current = i >= 0 && !is_searched(all, i);
        Neighbour best = none;
        if (current) {
            const int before = all.nearest()[i];
            best = candidate(found[i].sum, all.slot()[i], before, all.slot()[before],
                             method);
            best = next_row(all, matrix, i, all.joined(), now.joined, lane % lanes,
                            lanes, num_tokens, method, best);
        }
        keep_nearest(next, current ? i : -1, best, lanes);
    }
}

// One warp, one row of the dendrogram: merges by height, their nodes named by it.
// Called, as `begin`.
__device__ __noinline__ void write_rows(const Tree& tree, acc_t unit, int made,
                                        long long num_tokens, int method, int warp,
                                        int warps, double* out) {
    for (long long t = warp; t < num_tokens - 1; t += warps) {
        if (t >= made) {
            if (threadIdx.x % 32 == 0) store_no_row(out, t);
            continue;
        }
        long long node[2] = {tree.merge()[t].left, tree.merge()[t].right};
        for (int side = 0; side < 2; ++side)
            if (node[side] >= num_tokens)
                node[side] = num_tokens +
                             merge_rank(tree.height(), made, node[side] - num_tokens);
        const long long row = merge_rank(tree.height(), made, t);
        const double height = tree.height()[t];
        if (threadIdx.x % 32 == 0)
            store_row(out, row, node[0], node[1],
                      method == WARD ? sqrt(height * double(unit)) : height,
                      tree.merge()[t].tokens);
    }
}

// matrix (B, N, N): cosines, used up unless there is shared memory for a matrix (N, N).
// `blocks` work at a sequence. Of the sequences at work at once, `trees` holds what
// becomes the dendrograms, `found` (2, N) the nearest clusters and `arrived` zeros;
// `states` holds the clusters of every block, or is null if there is shared memory for
// them. rounds (B,).
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    linkage(acc_t* matrix, const acc_t* mass, const bool* mask, const bool* protect,
            const int* counts, long long batch, long long num_tokens,
            long long num_groups, long long method, long long in_shared,
            long long blocks, long long state_bytes, long long tree_bytes,
            unsigned char* trees, unsigned char* found, unsigned char* states,
            unsigned* arrived, double* out, int* rounds) {
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());  // 128, state, matrix
    auto* neighbours = reinterpret_cast<Neighbour*>(scratch);
    unsigned char* state = states ? states + blockIdx.x * state_bytes
                                  : reinterpret_cast<unsigned char*>(scratch + 128);
    const int share = static_cast<int>(blocks);
    const int place = blockIdx.x / share, places = gridDim.x / share;
    const int block = blockIdx.x % share;
    const bool first = block == 0;
    const int warps = share * (blockDim.x / 32);
    const int warp = threadIdx.x / 32 * share + block;
    if (place >= places) return;  // of a group that is not whole
    Clusters all = {state, static_cast<int>(num_tokens), 0};
    const Tree tree = {trees + place * tree_bytes, static_cast<int>(num_tokens)};
    Found* old = reinterpret_cast<Found*>(found) + place * 2 * num_tokens;
    Found* next = old + num_tokens;  // in turns, or one block overtakes another
    const auto meet = [&] {
        if (share > 1)
            blocks_barrier(arrived + place, share);
        else
            __syncthreads();
    };
    for (long long b = place; b < batch; b += places) {
        const long long row = b * num_tokens;  // of (B, N)
        acc_t* cosines = matrix + row * num_tokens;
        acc_t* sums =
            in_shared ? reinterpret_cast<acc_t*>(state + state_bytes) : cosines;
        acc_t unit;
        all.turn = 0;
        Progress now =
            begin(all, tree, first, cosines, mass ? mass + row : nullptr,
                  mask ? mask + row : nullptr, protect ? protect + row : nullptr,
                  num_tokens, count_of(counts, b, num_groups), scratch, &unit);
        for (int p = warp; p < now.clusters && !now.done; p += warps) {
            const int i = all.active()[p];
            first_row(all, cosines + i * num_tokens, sums + i * num_tokens, i,
                      now.clusters, method, next);
        }
        while (!now.done) {
            meet();
            Found* given = old;
            old = next;
            next = given;
            plan_round(all, tree, first, old, now, num_tokens, method, scratch);
            if (!now.done)
                next_rows(all, sums, now, block, share, old, next, num_tokens, method,
                          neighbours);
        }
        meet();  // the first block's last merges
        write_rows(tree, unit, now.made, num_tokens, method, warp, warps,
                   out + b * (num_tokens - 1) * 4);
        if (first && threadIdx.x == 0) rounds[b] = now.rounds;
        meet();  // before the next sequence takes this one's place
    }
}
