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
// The row of a cluster is that of its first token, and its column is its slot: at first
// the same. When half of the slots are empty, the columns in use move together. Several
// blocks work at a sequence. Each keeps the clusters for itself and plans every round
// as all others do, so they wait for each other once a round, to exchange the nearest
// clusters that they have found, and once more where columns move. When the rest fits
// the shared memory of a block, the first one goes on alone. Rows where little has
// changed take a warp; those that are searched anew take a block.

constexpr int COMPLETE = 1, WARD = 2;         // 0: average
constexpr int UNTOUCHED = -1, ABSORBED = -2;  // else: the slot that this one absorbs
constexpr int AHEAD = 4, READ = 8;  // loads in flight: of rows, of what was found
constexpr int PART = 64;            // columns that are worth another warp

// A cluster, as every row asks for it.
struct __align__(2 * sizeof(acc_t)) Slot {
    acc_t inverse;  // 1 / W
    int mate;       // the slot that it absorbs in this round
};

struct __align__(2 * sizeof(acc_t)) Weight {
    acc_t weight, spread;  // W, and E(A, A) / W^2
};

// What a distance takes of a cluster.
struct Side {
    acc_t inverse, spread;
};

constexpr int SLOT_BYTES =
    sizeof(Slot) + sizeof(Weight) + sizeof(acc_t) + 22;  // in `Clusters`

// The nearest cluster of a slot, and E with it.
struct Found {
    acc_t sum;
    int slot;
};

struct Merge {
    int left, right, tokens;  // the nodes it joins
};

__device__ __forceinline__ acc_t distance(acc_t e, const Side& a, const Side& b,
                                          int method) {
    if (method == COMPLETE) return e;
    const acc_t mean = e * (a.inverse * b.inverse);
    if (method != WARD) return mean;
    const acc_t gap = 2 * mean - (a.spread + b.spread);
    return (gap < 0 ? acc_t(0) : gap) * 2 / (a.inverse + b.inverse);  // keeps a NaN
}

// The clusters of a sequence: a copy for each block, in the order it lies in. Lists are
// found when they are asked for: pointers to all of them would take too many registers.
// The sizes of both parts are in qm_cupy/_linkage_cuda.py.
struct Clusters {
    acc_t* heights;        // (N,) of the merges made
    unsigned char* state;  // of the slots
    int num_slots;
    int turn;  // which of two lists is `active`

    __device__ Slot* slot() const { return reinterpret_cast<Slot*>(state); }
    __device__ Weight* weight() const {
        return reinterpret_cast<Weight*>(slot() + num_slots);
    }
    __device__ Side side(int i, const Slot& slot, int method) const {
        return {slot.inverse, method == WARD ? weight()[i].spread : acc_t(0)};
    }
    __device__ Side side(int i, int method) const { return side(i, slot()[i], method); }
    // E with the nearest cluster; of one that has just merged, the distance.
    __device__ acc_t* sum() const {
        return reinterpret_cast<acc_t*>(weight() + num_slots);
    }
    __device__ int* nearest() const {
        return reinterpret_cast<int*>(sum() + num_slots);
    }
    // The first token, in whose row of the matrix the cluster is.
    __device__ int* token() const { return list(0); }
    // The slots there are, and room for those after this round.
    __device__ int* active() const { return list(1 + turn); }
    __device__ int* next() const { return list(2 - turn); }
    // The same slots: those that are searched anew, then the others.
    __device__ int* rows() const { return list(3); }
    __device__ int* joined() const { return list(4); }  // half as many, that are new

    // Of each token, 1 / |x|: before the first round, when there is no merge.
    __device__ acc_t* scale() const { return heights; }

    __device__ int* list(int k) const { return nearest() + (1 + k) * num_slots; }
};

// E of all clusters. A row is that of the first token, or, if `dense`, of the slot.
struct Matrix {
    acc_t* data;
    long long width;
    bool dense;

    __device__ __forceinline__ acc_t* row(const Clusters& all, int i) const {
        return data + (dense ? i : all.token()[i]) * width;
    }
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
    // (N,) the row of merge t, and how many there are, after the last round, when no
    // node is needed.
    __device__ int* rank() const { return reinterpret_cast<int*>(data); }
    __device__ int* made() const { return rank() + num_tokens; }
};

// Where a sequence stands, the same in all threads of the blocks that are at work.
struct Progress {
    int clusters, joined, searched;  // how many there are, are new, are searched anew
    int made;                        // merges
    int rounds;
    int slots;  // in use, or empty
    bool done;
};

// In shared memory, as every register counts: the mass that counts as 1, and how many
// merges are wanted.
struct Goal {
    acc_t unit;
    int wanted;
};
__device__ __forceinline__ Goal* goal() {  // behind what the scratch is used for
    return reinterpret_cast<Goal*>(reinterpret_cast<acc_t*>(dynamic_shared()) + 124);
}

// Distances are compared without their last bits, which rounding alone decides.
__device__ __forceinline__ float compared(float x) {
    return __uint_as_float((__float_as_uint(x) + 4) & ~7u);
}
__device__ __forceinline__ double compared(double x) {
    return __longlong_as_double((__double_as_longlong(x) + 4) & ~7ll);
}

__device__ __forceinline__ Neighbour candidate(acc_t e, const Side& own, int j,
                                               const Side& other, int method) {
    const acc_t exact = distance(e, own, other, method);
    // No NaN, whose bits may wrap.
    return {exact >= 0 ? compared(exact) : -padding(), e, j};
}

__device__ __forceinline__ acc_t join(acc_t x, acc_t y, int method) {
    return method == COMPLETE ? max(x, y) : x + y;
}

// How many clusters of each kind come before a warp's: three counts in one number, of
// 21 bits each, so that one pass sums all three.
struct Counts {
    unsigned long long packed;

    __device__ void add(int kept, int joined, int searched) {
        packed += kept | (unsigned long long)joined << 21 |
                  (unsigned long long)searched << 42;
    }
    __device__ int kept() const { return packed & 0x1FFFFF; }
    __device__ int joined() const { return packed >> 21 & 0x1FFFFF; }
    __device__ int searched() const { return static_cast<int>(packed >> 42); }
};

// The counts of all warps before this one; `total` becomes those of all.
__device__ __forceinline__ Counts counts_before(Counts own, unsigned long long* scratch,
                                                Counts* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = own.packed;
    __syncthreads();
    unsigned long long all = lane < warps ? scratch[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long before = __shfl_up_sync(~0u, all, step);
        if (lane >= step) all += before;
    }
    total->packed = __shfl_sync(~0u, all, 31);
    const unsigned long long earlier = __shfl_sync(~0u, all, max(warp - 1, 0));
    return {warp > 0 ? earlier : 0};
}

// Set up the clusters, of one token each.
// Called, not in line: it would take registers from the rounds.
__device__ __noinline__ Progress begin(Clusters& all, const Tree& tree, bool first,
                                       const acc_t* cosines, const acc_t* mass,
                                       const bool* mask, const bool* protect,
                                       long long num_tokens, long long num_groups,
                                       acc_t* scratch) {
    acc_t top = 0;
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i])) top = max(top, mass[i]);
    top = block_reduce(top, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        // So that a token of no mass still joins its nearest.
        const acc_t weight = top > 0 ? max(mass[i] / top, acc_t(1e-6)) : acc_t(1);
        all.slot()[i] = {1 / weight, UNTOUCHED};
        all.weight()[i] = {weight, 0};
        all.token()[i] = static_cast<int>(i);
        all.scale()[i] = inverse_length(cosines[i * num_tokens + i]);
        if (!first) continue;
        tree.node()[i] = {0, static_cast<int>(i), 1};
    }
    int tokens;
    const int clusters =
        list_tokens(mask, protect, num_tokens, reinterpret_cast<int*>(scratch),
                    all.active(), &tokens);
    const long long wanted = min(tokens - num_groups, clusters - 1ll);
    if (threadIdx.x == 0)
        *goal() = {top > 0 ? top : acc_t(1), static_cast<int>(wanted)};
    __syncthreads();
    return {clusters, 0, 0, 0, 0, static_cast<int>(num_tokens), wanted <= 0};
}

// What a round does to a cluster: the slot that it absorbs, and whether its row needs
// every column, because it is new or its nearest cluster is no more.
struct Change {
    int mate;
    bool searched;
};

// Pairs that are each other's nearest merge, in the slot of the first.
__device__ __forceinline__ Change change_of(const int* nearest, int i) {
    const int j = nearest[i], back = j < 0 ? -1 : nearest[j];
    if (back == i) return {i < j ? j : ABSORBED, i < j};
    return {UNTOUCHED, back < 0 || nearest[back] == j};
}

// Whether the `wanted` lowest merges are made: those to come are no lower than the
// closest pair there is now.
__device__ bool is_enough(const Clusters& all, const Progress& now, int method,
                          acc_t* scratch) {
    acc_t least = -NEVER, lower = 0;
    for (int p = threadIdx.x; p < now.clusters; p += blockDim.x) {
        const int i = all.active()[p], j = all.nearest()[i];
        if (j >= 0)
            least = min(least, distance(all.sum()[i], all.side(i, method),
                                        all.side(j, method), method));
    }
    least = compared(block_reduce(least, scratch, Least()));
    for (int t = threadIdx.x; t < now.made; t += blockDim.x)
        lower += compared(all.heights[t]) <= least;
    lower = block_reduce(lower, scratch, Add());
    __syncthreads();  // the scratch is used again
    return lower >= goal()->wanted;
}

// Read what all blocks have found: the nearest clusters, and the heights of the merges
// of the round before. Called, as `begin`.
__device__ __noinline__ void read_found(const Clusters& all, const acc_t* height,
                                        const Found* found, int clusters, int joined,
                                        int made) {
    const int threads = blockDim.x;
    for (int q = threadIdx.x; q < joined; q += threads) {
        const int t = made - joined + q;
        all.heights[t] = height[t];
    }
    for (int p0 = threadIdx.x; p0 < clusters; p0 += threads * READ) {
        Found own[READ];  // all loads before the first store, which they could not pass
#pragma unroll
        for (int k = 0; k < READ; ++k)
            if (p0 + threads * k < clusters)
                own[k] = found[all.active()[p0 + threads * k]];
#pragma unroll
        for (int k = 0; k < READ; ++k) {
            if (p0 + threads * k >= clusters) break;
            const int i = all.active()[p0 + threads * k];
            all.nearest()[i] = own[k].slot;
            all.sum()[i] = own[k].sum;
        }
    }
    __syncthreads();
}

// Put the cluster that slot i absorbs into it. Called, as `begin`.
__device__ __noinline__ void merge_slots(Slot* slot, Weight* weight, acc_t* sum, int i,
                                         int method) {
    const int j = slot[i].mate;
    const Weight a = weight[i], b = weight[j];
    const acc_t e = sum[i], both = a.weight + b.weight;
    const acc_t within =
        a.spread * a.weight * a.weight + b.spread * b.weight * b.weight;
    sum[i] =
        distance(e, {slot[i].inverse, a.spread}, {slot[j].inverse, b.spread}, method);
    weight[i] = {both, (within + 2 * e) / (both * both)};
    slot[i].inverse = 1 / both;
}

// Merge all pairs that are each other's nearest.
__device__ void plan_round(Clusters& all, Progress& now, int method, acc_t* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int each = (now.clusters + 32 * warps - 1) / (32 * warps) * 32;  // of a warp
    const int begin = min(warp * each, now.clusters);
    const int end = min(begin + each, now.clusters);
    const auto change = [&](int p) {
        return p < end ? change_of(all.nearest(), all.active()[p])
                       : Change{ABSORBED, false};
    };
    Counts own = {0}, total;
    for (int p0 = begin; p0 < end; p0 += 32) {
        const Change x = change(p0 + lane);
        own.add(__popc(__ballot_sync(~0u, x.mate != ABSORBED)),
                __popc(__ballot_sync(~0u, x.mate >= 0)),
                __popc(__ballot_sync(~0u, x.searched)));
    }
    auto* sums = reinterpret_cast<unsigned long long*>(scratch);
    Counts place = counts_before(own, sums, &total);
    for (int p0 = begin; p0 < end; p0 += 32) {
        const Change x = change(p0 + lane);
        const unsigned kept = __ballot_sync(~0u, x.mate != ABSORBED);
        const unsigned joined = __ballot_sync(~0u, x.mate >= 0);
        const unsigned searched = __ballot_sync(~0u, x.searched);
        const unsigned before = (1u << lane) - 1;
        if (x.mate != ABSORBED) {
            const int i = all.active()[p0 + lane];
            const int to = place.kept() + __popc(kept & before);
            const int row = place.searched() + __popc(searched & before);
            all.next()[to] = i;
            all.rows()[x.searched ? row : total.searched() + to - row] = i;
            all.slot()[i].mate = x.mate;
            if (x.mate >= 0) {
                all.joined()[place.joined() + __popc(joined & before)] = i;
                merge_slots(all.slot(), all.weight(), all.sum(), i, method);
            }
        }
        place.add(__popc(kept), __popc(joined), __popc(searched));
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

// One block: write this round's merges. From the last thread on, as warps behind have
// the least to search. Called, as `begin`.
__device__ __noinline__ void record_merges(const Clusters& all, const Tree& tree,
                                           int joined, int made) {
    for (int q = blockDim.x - 1 - threadIdx.x; q < joined; q += blockDim.x) {
        const int i = all.joined()[q], t = made - joined + q;
        Node& node = tree.node()[all.token()[i]];
        const Node left = node, right = tree.node()[all.token()[all.slot()[i].mate]];
        const acc_t height = max(all.sum()[i], max(left.height, right.height));
        const int tokens = left.tokens + right.tokens;
        node = {height, tree.num_tokens + t, tokens};
        tree.height()[t] = height;
        tree.merge()[t] = {left.number, right.number, tokens};
    }
}

// Move the columns in use to the left, in every row in use, a warp a row. Lists keep
// the old slots: `renumber` follows.
__device__ void move_columns(const Clusters& all, const Matrix& matrix, int clusters,
                             int warp, int warps) {
    for (int q = warp; q < clusters; q += warps) {
        acc_t* row = matrix.row(all, all.active()[q]);
        for (int p0 = threadIdx.x % 32; p0 - threadIdx.x % 32 < clusters;
             p0 += 32 * AHEAD) {
            acc_t e[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (p0 + 32 * k < clusters) e[k] = row[all.active()[p0 + 32 * k]];
            __syncwarp();  // no column moves to the right, so later ones are safe
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (p0 + 32 * k < clusters) row[p0 + 32 * k] = e[k];
        }
    }
}

// One block: number the slots in use anew, 0 .. clusters - 1, in their order. `state`
// is where they go, with room for `num_slots`: other memory only if no thread has more
// than one.
__device__ void renumber(const Clusters& all, int clusters, unsigned char* state,
                         int num_slots) {
    int* place = all.rows();  // by old slot
    for (int p = threadIdx.x; p < clusters; p += blockDim.x) place[all.active()[p]] = p;
    __syncthreads();
    Clusters moved = {all.heights, state, num_slots, 1 - all.turn};
    for (int p0 = 0; p0 < clusters; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x, i = all.active()[min(p, clusters - 1)];
        const Slot slot = all.slot()[i];
        const Weight weight = all.weight()[i];
        const acc_t sum = all.sum()[i];
        const int nearest = all.nearest()[i], token = all.token()[i];
        const int near = nearest < 0 ? nearest : place[nearest];
        __syncthreads();  // all have read, and no slot moves up
        if (p < clusters) {
            moved.slot()[p] = slot;
            moved.weight()[p] = weight;
            moved.sum()[p] = sum;
            moved.nearest()[p] = near;
            moved.token()[p] = token;
            moved.active()[p] = p;
        }
    }
    __syncthreads();
}

// One block: copy a matrix, whose columns have been moved, to shared memory. Called, as
// `begin`.
__device__ __noinline__ void hold(const Clusters& all, const Matrix& matrix,
                                  const Matrix& held) {
    for (int i = threadIdx.x / 32; i < all.num_slots; i += blockDim.x / 32) {
        const acc_t* row = matrix.row(all, i);
        for (int j = threadIdx.x % 32; j < all.num_slots; j += 32)
            held.row(all, i)[j] = row[j];
    }
    __syncthreads();
}

// Keep the nearest cluster that any of the `lanes` at row i has found; -1 is no row.
__device__ __forceinline__ void keep_nearest(const Clusters& all, Found* next, int i,
                                             Neighbour best, int lanes = 32) {
    best = warp_nearest(all.token(), i, best, lanes);
    if (i >= 0 && threadIdx.x % lanes == 0) next[i] = {best.sum, best.slot};
}

// One warp: E of row i with all clusters, from cosines, and its nearest one. Called, as
// `begin`.
__device__ __noinline__ void first_row(const Clusters& all, const acc_t* cosines,
                                       acc_t* row, int i, int clusters, int method,
                                       Found* next) {
    const Side own = all.side(i, method);
    const acc_t weight = all.weight()[i].weight, scale = all.scale()[i];
    Neighbour best = no_neighbour();
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
                   (weight * all.weight()[j].weight);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            if (j == i) continue;
            row[j] = e[k];
            const Neighbour found =
                candidate(e[k], own, j, all.side(j, method), method);
            if (nearer(all.token(), i, found, best)) best = found;
        }
    }
    keep_nearest(all, next, i, best);
}

// Bring row i up to date with this round's merges, in every `step`-th of the columns
// from `start`; return the nearest cluster among them and `best`. JOINED: it is new.
template <bool JOINED>
__device__ __forceinline__ Neighbour next_row(const Clusters& all, const Matrix& matrix,
                                              int i, const int* columns, int count,
                                              int start, int step, int method,
                                              Neighbour best) {
    acc_t* row = matrix.row(all, i);
    const Slot slot = all.slot()[i];
    const Side own = all.side(i, slot, method);
    const acc_t* absorbed = JOINED ? matrix.row(all, slot.mate) : nullptr;
    constexpr int LOADS = JOINED ? AHEAD / 2 : AHEAD;  // columns, of twice the values
    for (int p0 = start; p0 < count; p0 += step * LOADS) {
        // All loads before the first use, so that a warp waits once for all of them,
        // and before the first store, which they could not pass.
        int column[LOADS];
        Slot other[LOADS];
        acc_t e[LOADS], right[LOADS], below[LOADS], corner[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int p = p0 + step * k;
            column[k] = p < count ? columns[p] : i;
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            other[k] = all.slot()[j];
            const int mate = other[k].mate;
            const bool two = mate >= 0 && j != i;
            e[k] = row[j];
            right[k] = two ? row[mate] : acc_t(0);
            below[k] = JOINED ? absorbed[j] : acc_t(0);
            corner[k] = JOINED && two ? absorbed[mate] : acc_t(0);
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            if (j == i) continue;
            // In this order, so that row j finds the same: the sums commute.
            const bool two = other[k].mate >= 0;
            acc_t sum = e[k];
            if (JOINED && two)
                sum = join(join(sum, corner[k], method),
                           join(right[k], below[k], method), method);
            else if (JOINED)
                sum = join(sum, below[k], method);
            else if (two)
                sum = join(sum, right[k], method);
            if (JOINED || two) row[j] = sum;
            const Neighbour found =
                candidate(sum, own, j, all.side(j, other[k], method), method);
            if (nearer(all.token(), i, found, best)) best = found;
        }
    }
    return best;
}

// One warp: row i, in one of `parts` of all columns.
__device__ __forceinline__ Neighbour search_row(const Clusters& all,
                                                const Matrix& matrix, int i,
                                                int clusters, int part, int parts,
                                                int method) {
    const int start = part * 32 + threadIdx.x % 32, step = parts * 32;
    const Neighbour none = no_neighbour();
    if (all.slot()[i].mate >= 0)
        return next_row<true>(all, matrix, i, all.active(), clusters, start, step,
                              method, none);
    return next_row<false>(all, matrix, i, all.active(), clusters, start, step, method,
                           none);
}

// The rows that keep their nearest cluster look at the new ones. As many lanes at a row
// as have one to look at.
__device__ __forceinline__ void next_columns(const Clusters& all, const Matrix& matrix,
                                             const Progress& now, int warp, int warps,
                                             Found* next, int method) {
    const int lane = threadIdx.x % 32;
    int lanes = 1;
    while (lanes < 32 && lanes * AHEAD < now.joined) lanes *= 2;
    const int rows = 32 / lanes;
    for (int q0 = now.searched + warp * rows; q0 < now.clusters; q0 += warps * rows) {
        const int q = q0 + lane / lanes, i = q < now.clusters ? all.rows()[q] : -1;
        Neighbour best = no_neighbour();
        if (i >= 0 && lane % lanes == 0) {  // one alone, or it would tie with itself
            const int before = all.nearest()[i];
            best = candidate(all.sum()[i], all.side(i, method), before,
                             all.side(before, method), method);
        }
        if (i >= 0) {
            best = next_row<false>(all, matrix, i, all.joined(), now.joined,
                                   lane % lanes, lanes, method, best);
        }
        keep_nearest(all, next, i, best, lanes);
    }
}

// Bring every row up to date. `block` of `blocks` has rows of its own; the nearest
// clusters go to `next`.
__device__ void next_rows(const Clusters& all, const Matrix& matrix,
                          const Progress& now, int block, int blocks, Found* next,
                          int method, Neighbour* scratch) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32, warps = blockDim.x / 32;
    // Rows that are searched, first: they take longest. Where a block has fewer of them
    // than warps, several warps share the columns of one.
    const int turns = (now.searched + blocks - 1) / blocks;
    const int parts =
        max(min(warps / max(turns, 1), (now.clusters + PART - 1) / PART), 1);
    const int at_once = warps / parts, part = own % parts;
    Neighbour best = no_neighbour();
    int i = -1;
    for (int q = own / parts; q < turns && own / parts < at_once; q += at_once) {
        const int place = q * blocks + block;
        if (place >= now.searched) break;
        i = all.rows()[place];
        best = search_row(all, matrix, i, now.clusters, part, parts, method);
        best = warp_nearest(all.token(), i, best);
        if (lane == 0 && parts == 1) next[i] = {best.sum, best.slot};
    }
    if (parts > 1 && lane == 0) scratch[own] = best;
    // The others by the last warps first: these have no part, or the shortest.
    next_columns(all, matrix, now, (warps - 1 - own) * blocks + block, blocks * warps,
                 next, method);
    if (parts == 1) return;
    __syncthreads();
    if (i >= 0 && part == 0)
        keep_nearest(all, next, i, lane < parts ? scratch[own + lane] : no_neighbour());
}

// One warp: rows of the dendrogram, merges by height, whose nodes are named by it.
// Called, as `begin`.
__device__ __noinline__ void write_rows(const Tree& tree, int made,
                                        long long num_tokens, int method, int warp,
                                        int warps, double* out) {
    const long long threads = warps * 32;
    for (long long t = warp * 32 + threadIdx.x % 32; t < num_tokens - 1; t += threads) {
        if (t >= made) {
            store_no_row(out, t);
            continue;
        }
        const Merge merge = tree.merge()[t];
        const auto named = [&](int node) {
            return node < num_tokens ? node
                                     : num_tokens + tree.rank()[node - num_tokens];
        };
        const double height = tree.height()[t];
        store_row(out, tree.rank()[t], named(merge.left), named(merge.right),
                  method == WARD ? sqrt(height * double(goal()->unit)) : height,
                  merge.tokens);
    }
}

// matrix (B, N, N): cosines, used up unless there is shared memory for a matrix (N, N)
// and for what is found. `blocks` work at a sequence, until one has shared memory for
// the clusters that are left, `most_held` of them. Of the sequences at work at once,
// `trees` holds what becomes the dendrograms, `found` (2, N) the nearest clusters and
// `arrived` zeros; `states` holds the clusters of every block, or is null if there is
// shared memory for them. rounds (B,).
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    linkage(acc_t* matrix, const acc_t* mass, const bool* mask, const bool* protect,
            const int* counts, long long batch, long long num_tokens,
            long long num_groups, long long method, long long in_shared,
            long long most_held, long long blocks, long long state_bytes,
            long long tree_bytes, unsigned char* trees, unsigned char* found,
            unsigned char* states, unsigned* arrived, double* out, int* rounds) {
    // In shared memory: 128 values, state, what is found, matrix.
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());
    auto* neighbours = reinterpret_cast<Neighbour*>(scratch);
    auto* shared = reinterpret_cast<unsigned char*>(scratch + 128);
    unsigned char* state = states ? states + blockIdx.x * state_bytes : shared;
    const long long height_bytes = (num_tokens * sizeof(acc_t) + 15) / 16 * 16;
    if (!states) shared += height_bytes;  // what `hold` may take
    const int share = static_cast<int>(blocks), tokens = static_cast<int>(num_tokens);
    const int place = blockIdx.x / share, places = gridDim.x / share;
    const int block = blockIdx.x % share;
    const bool first = block == 0;
    const int warps = share * (blockDim.x / 32);
    const int warp = threadIdx.x / 32 * share + block;
    if (place >= places) return;  // of a group that is not whole
    const Tree tree = {trees + place * tree_bytes, tokens};
    const auto meet = [&] {
        if (share > 1)
            blocks_barrier(arrived + place, share);
        else
            __syncthreads();
    };
    for (long long b = place; b < batch; b += places) {
        const long long row = b * num_tokens;  // of (B, N)
        acc_t* cosines = matrix + row * num_tokens;
        // Functions that are called take addresses, which would keep `all` out of
        // registers.
        Clusters begun = {reinterpret_cast<acc_t*>(state), state + height_bytes, tokens,
                          0};
        // What is found, of this round and the next: or one block overtakes another.
        Found* told = in_shared
                          ? reinterpret_cast<Found*>(state + state_bytes)
                          : reinterpret_cast<Found*>(found) + place * 2 * num_tokens;
        Matrix sums = {
            in_shared ? reinterpret_cast<acc_t*>(told + 2 * num_tokens) : cosines,
            num_tokens, false};
        Progress now =
            begin(begun, Tree(tree), first, cosines, mass ? mass + row : nullptr,
                  mask ? mask + row : nullptr, protect ? protect + row : nullptr,
                  num_tokens, count_of(counts, b, num_groups), scratch);
        for (int p = warp; p < now.clusters && !now.done; p += warps) {
            const int i = begun.active()[p];
            first_row(begun, cosines + i * num_tokens, sums.data + i * num_tokens, i,
                      now.clusters, method, told);
        }
        Clusters all = begun;
        while (!now.done) {
            if (sums.dense)
                __syncthreads();
            else
                meet();
            const int turn = now.rounds % 2;
            read_found(Clusters(all), tree.height(), told + turn * all.num_slots,
                       now.clusters, now.joined, now.made);
            if (now.made >= goal()->wanted && is_enough(all, now, method, scratch))
                break;
            const bool last = share > 1 && now.clusters <= most_held;
            if (!in_shared && !sums.dense && (last || now.clusters <= now.slots / 2)) {
                move_columns(all, sums, now.clusters, warp, warps);
                now.slots = now.clusters;
                unsigned char* to = last ? shared : all.state;
                const int room = last ? now.slots : all.num_slots;
                renumber(all, now.slots, to, room);
                all = {all.heights, to, room, 1 - all.turn};
                meet();
                if (last) {  // clusters, what is found and matrix in shared memory
                    told = reinterpret_cast<Found*>(
                        shared + (now.slots * SLOT_BYTES + 15) / 16 * 16);
                    const Matrix held = {reinterpret_cast<acc_t*>(told + 2 * now.slots),
                                         now.slots, true};
                    if (first) hold(Clusters(all), Matrix(sums), Matrix(held));
                    sums = held;
                    if (!first) break;
                }
            }
            plan_round(all, now, method, scratch);
            if (now.done) break;
            if (first) record_merges(Clusters(all), Tree(tree), now.joined, now.made);
            next_rows(all, sums, now, sums.dense ? 0 : block, sums.dense ? 1 : share,
                      told + (1 - turn) * all.num_slots, method, neighbours);
        }
        if (sums.dense) {
            if (first && threadIdx.x == 0) *tree.made() = now.made;
            meet();
            const int before = now.made;
            now.made = *tree.made();
            for (int t = before + threadIdx.x; t < now.made; t += blockDim.x)
                all.heights[t] = tree.height()[t];
            __syncthreads();
        }
        for (int t = warp; t < now.made; t += warps) {
            const int rank = static_cast<int>(merge_rank(all.heights, now.made, t));
            if (threadIdx.x % 32 == 0) tree.rank()[t] = rank;
        }
        meet();
        write_rows(Tree(tree), now.made, num_tokens, method, warp, warps,
                   out + b * (num_tokens - 1) * 4);
        if (first && threadIdx.x == 0) rounds[b] = now.rounds;
        meet();  // before the next sequence takes this one's place
    }
}
