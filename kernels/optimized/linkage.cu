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
//
// Clusters are in linkage_clusters.cuh, the moves of columns in linkage_columns.cuh,
// the search of rows in linkage_rows.cuh; single_linkage.cu shares linkage.cuh.

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
        const acc_t weight = top > 0 ? max(mass[i] / top, acc_t(LEAST_MASS)) : acc_t(1);
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
    acc_t least = -MASKED_SCORE, lower = 0;
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
    // In shared memory: scratch, state, what is found, matrix.
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());
    auto* neighbours = reinterpret_cast<Neighbour*>(scratch);
    auto* shared = reinterpret_cast<unsigned char*>(scratch + LINKAGE_SCRATCH);
    unsigned char* state = states ? states + blockIdx.x * state_bytes : shared;
    const long long height_bytes = aligned_bytes(num_tokens * sizeof(acc_t));
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
                        shared + aligned_bytes(now.slots * SLOT_BYTES));
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
