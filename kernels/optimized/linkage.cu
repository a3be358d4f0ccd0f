// Average, complete and ward linkage in rounds of reciprocal nearest neighbours: in one
// round, every two clusters that are each other's nearest merge. With these three
// distances a merge never brings the new cluster nearer to a third one than its parts
// were. So the rounds give the dendrogram of the textbook, which merges one closest
// pair after another.
//
//   E(A, C) = sum of m_a m_c (1 - cos)      adds up:  E(A u B, C) = E(A, C) + E(B, C)
//   average   E / (W_A W_C)                 W: total mass; one token has mass 1 or m
//   complete  the largest 1 - cos           E is this maximum instead of the sum
//   ward      2 W_A W_C / (W_A + W_C) |mu_A - mu_C|^2; the height is its square root
//   |mu_A - mu_C|^2 = 2 E(A, C) / (W_A W_C) - E(A, A) / W_A^2 - E(C, C) / W_C^2
//
// Layout of the matrix: a cluster has the row of its first token, and its column is its
// slot. At first slot and token are the same. When half of the slots are empty, the
// columns in use move together.
//
// Threads: a team of blocks works on one sequence. Each block keeps its own copy of all
// clusters and plans every round itself. All blocks plan from the same data, so they
// reach the same plan without exchanging it. They synchronise once a round, to exchange
// the nearest clusters, and once more when columns move. When the remaining clusters
// fit the shared memory of one block, the first block continues alone. A row with few
// changes takes one warp or a part of it; several warps may search one row together.
//
// linkage_clusters.cuh defines clusters, linkage_columns.cuh moves columns,
// linkage_rows.cuh updates and searches rows. single_linkage.cu also uses linkage.cuh.

// The clusters before those of a warp, counted by what happens to them. Three counts of
// 21 bits are packed in one number, so one prefix sum adds all three.
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

// Return the counts of all warps before this one; `total` receives the sum over all
// warps.
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

// Set up one cluster for each token that may merge.
// Not inlined: an inlined copy would take registers from the rounds.
__device__ __noinline__ Progress init_clusters(Clusters& all, const Tree& tree,
                                               bool first, const acc_t* cosines,
                                               const acc_t* mass, const bool* mask,
                                               const bool* protect,
                                               long long num_tokens,
                                               long long num_groups, acc_t* scratch) {
    acc_t top = 0;
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i])) top = max(top, mass[i]);
    top = block_reduce(top, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        // The lower bound lets a token of mass 0 still join its nearest cluster.
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

// What a round does to a cluster. `mate` is the slot that it absorbs, UNTOUCHED or
// ABSORBED. `searched`: its row needs a search over every column, because the cluster
// is new or because its nearest cluster merges.
struct Change {
    int mate;
    bool searched;
};

// Slots i and j merge if each is the other's nearest. The lower slot keeps the union.
__device__ __forceinline__ Change change_of(const int* nearest, int i) {
    const int j = nearest[i], back = j < 0 ? -1 : nearest[j];
    if (back == i) return {i < j ? j : ABSORBED, i < j};
    return {UNTOUCHED, back < 0 || nearest[back] == j};
}

// Return whether the `wanted` lowest merges are made. No later merge is lower than the
// closest pair of now, so the merges up to that height are final. (Rounds make merges
// out of order: a round may make a high merge before another round makes a low one.)
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

// Copy what all blocks published into this block's clusters: the nearest clusters, and
// the heights of the merges of the last round. Not inlined, as `init_clusters`.
__device__ __noinline__ void read_published(const Clusters& all, const acc_t* height,
                                            const NearestCluster* published,
                                            int clusters, int joined, int made) {
    const int threads = blockDim.x;
    for (int q = threadIdx.x; q < joined; q += threads) {
        const int t = made - joined + q;
        all.heights[t] = height[t];
    }
    for (int p0 = threadIdx.x; p0 < clusters; p0 += threads * EXCHANGE_LOADS) {
        NearestCluster own[EXCHANGE_LOADS];
        // All loads come first: the compiler cannot move a load above an earlier store.
#pragma unroll
        for (int k = 0; k < EXCHANGE_LOADS; ++k)
            if (p0 + threads * k < clusters)
                own[k] = published[all.active()[p0 + threads * k]];
#pragma unroll
        for (int k = 0; k < EXCHANGE_LOADS; ++k) {
            if (p0 + threads * k >= clusters) break;
            const int i = all.active()[p0 + threads * k];
            all.nearest()[i] = own[k].slot;
            all.sum()[i] = own[k].sum;
        }
    }
    __syncthreads();
}

// Add the cluster that slot i absorbs to slot i:
//   W = W_A + W_B,   E(A u B, A u B) = E(A, A) + E(B, B) + 2 E(A, B)
// `sum` of slot i becomes the distance of the merge, which `record_merges` reads. Not
// inlined, as `init_clusters`.
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

// Merge all pairs that are each other's nearest. The first pass counts what happens to
// the clusters of each warp; the second one writes the lists of the next round, in the
// order of the slots. Every block does this and reaches the same result.
__device__ void plan_round(Clusters& all, Progress& now, int method, acc_t* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int per_warp = (now.clusters + 32 * warps - 1) / (32 * warps) * 32;
    const int start = min(warp * per_warp, now.clusters);
    const int stop = min(start + per_warp, now.clusters);
    const auto change = [&](int p) {
        return p < stop ? change_of(all.nearest(), all.active()[p])
                        : Change{ABSORBED, false};
    };
    Counts own = {0}, total;
    for (int p0 = start; p0 < stop; p0 += 32) {
        const Change x = change(p0 + lane);
        own.add(__popc(__ballot_sync(~0u, x.mate != ABSORBED)),
                __popc(__ballot_sync(~0u, x.mate >= 0)),
                __popc(__ballot_sync(~0u, x.searched)));
    }
    auto* sums = reinterpret_cast<unsigned long long*>(scratch);
    Counts offset = counts_before(own, sums, &total);
    for (int p0 = start; p0 < stop; p0 += 32) {
        const Change x = change(p0 + lane);
        const unsigned kept = __ballot_sync(~0u, x.mate != ABSORBED);
        const unsigned joined = __ballot_sync(~0u, x.mate >= 0);
        const unsigned searched = __ballot_sync(~0u, x.searched);
        const unsigned before = (1u << lane) - 1;
        if (x.mate != ABSORBED) {
            const int i = all.active()[p0 + lane];
            const int to = offset.kept() + __popc(kept & before);
            const int row = offset.searched() + __popc(searched & before);
            all.next()[to] = i;
            all.rows()[x.searched ? row : total.searched() + to - row] = i;
            all.slot()[i].mate = x.mate;
            if (x.mate >= 0) {
                all.joined()[offset.joined() + __popc(joined & before)] = i;
                merge_slots(all.slot(), all.weight(), all.sum(), i, method);
            }
        }
        offset.add(__popc(kept), __popc(joined), __popc(searched));
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

// One block: write this round's merges. The last threads write first, because the last
// warps have the least to search. Not inlined, as `init_clusters`.
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

// One warp: write rows of the dendrogram. Row r is the merge of rank r by height, and
// N + r is its node, so a child that is a merge is named by that merge's rank. Not
// inlined, as `init_clusters`.
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

// matrix (B, N, N) holds the cosines and is overwritten, except if `in_shared`: then
// the matrix (N, N) of a sequence and its exchange are in shared memory. A team of
// `blocks_per_sequence` blocks works on a sequence until at most `max_resident`
// clusters are left, for which one block has enough shared memory.
//
// Each team has one entry in these arrays: `trees` (merges that become a dendrogram),
// `exchange` (2, N) (published nearest clusters) and `arrived` (counter of its barrier,
// 0 at first). `states` has the clusters of every block; it is null if they are in
// shared memory. rounds (B,) receives the number of rounds.
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    linkage(acc_t* matrix, const acc_t* mass, const bool* mask, const bool* protect,
            const int* counts, long long batch, long long num_tokens,
            long long num_groups, long long method, long long in_shared,
            long long max_resident, long long blocks_per_sequence,
            long long state_bytes, long long tree_bytes, unsigned char* trees,
            unsigned char* exchange, unsigned char* states, unsigned* arrived,
            double* out, int* rounds) {
    // Order in shared memory: scratch, state, exchange, matrix. All but the scratch are
    // there only if they fit.
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());
    auto* neighbours = reinterpret_cast<Neighbour*>(scratch);
    auto* shared = reinterpret_cast<unsigned char*>(scratch + LINKAGE_SCRATCH);
    unsigned char* state = states ? states + blockIdx.x * state_bytes : shared;
    const long long height_bytes = aligned_bytes(num_tokens * sizeof(acc_t));
    if (!states)
        shared += height_bytes;  // the resident clusters start behind the heights
    const int num_blocks = static_cast<int>(blocks_per_sequence),
              tokens = static_cast<int>(num_tokens);
    const int team = blockIdx.x / num_blocks, num_teams = gridDim.x / num_blocks;
    const int block = blockIdx.x % num_blocks;
    const bool first = block == 0;
    const int warps = num_blocks * (blockDim.x / 32);
    const int warp = threadIdx.x / 32 * num_blocks + block;
    if (team >= num_teams) return;  // this block's team is not complete
    const Tree tree = {trees + team * tree_bytes, tokens};
    const auto sync = [&] {
        if (num_blocks > 1)
            blocks_barrier(arrived + team, num_blocks);
        else
            __syncthreads();
    };
    for (long long b = team; b < batch; b += num_teams) {
        const long long row = b * num_tokens;  // of (B, N)
        acc_t* cosines = matrix + row * num_tokens;
        // Functions that are not inlined take addresses, and a variable whose address
        // is taken is not kept in registers. They therefore get copies, here `initial`
        // and below temporaries such as Clusters(all).
        Clusters initial = {reinterpret_cast<acc_t*>(state), state + height_bytes,
                            tokens, 0};
        // Two buffers in turn: one to read in this round, one to publish for the next.
        // With a single one, a fast block would overwrite entries that a slow block
        // still reads. A block writes the same buffer again only after the barrier of
        // the next round, which every block reaches after it has read the buffer.
        NearestCluster* published =
            in_shared
                ? reinterpret_cast<NearestCluster*>(state + state_bytes)
                : reinterpret_cast<NearestCluster*>(exchange) + team * 2 * num_tokens;
        Matrix sums = {
            in_shared ? reinterpret_cast<acc_t*>(published + 2 * num_tokens) : cosines,
            num_tokens, false};
        Progress now = init_clusters(
            initial, Tree(tree), first, cosines, mass ? mass + row : nullptr,
            mask ? mask + row : nullptr, protect ? protect + row : nullptr, num_tokens,
            count_of(counts, b, num_groups), scratch);
        for (int p = warp; p < now.clusters && !now.done; p += warps) {
            const int i = initial.active()[p];
            first_row(initial, cosines + i * num_tokens, sums.data + i * num_tokens, i,
                      now.clusters, method, published);
        }
        Clusters all = initial;
        while (!now.done) {
            // Wait until every row's nearest cluster is published.
            if (sums.dense)
                __syncthreads();
            else
                sync();
            const int buffer = now.rounds % 2;
            read_published(Clusters(all), tree.height(),
                           published + buffer * all.num_slots, now.clusters, now.joined,
                           now.made);
            if (now.made >= goal()->wanted && is_enough(all, now, method, scratch))
                break;
            // Move columns when half of the slots are empty, or when the rest fits one
            // block (`last`).
            const bool last = num_blocks > 1 && now.clusters <= max_resident;
            if (!in_shared && !sums.dense && (last || now.clusters <= now.slots / 2)) {
                move_columns(all, sums, now.clusters, warp, warps);
                now.slots = now.clusters;
                unsigned char* to = last ? shared : all.state;
                const int room = last ? now.slots : all.num_slots;
                renumber(all, now.slots, to, room);
                all = {all.heights, to, room, 1 - all.turn};
                sync();
                if (last) {  // clusters, exchange and matrix move to shared memory
                    published = reinterpret_cast<NearestCluster*>(
                        shared + aligned_bytes(now.slots * SLOT_BYTES));
                    const Matrix resident = {
                        reinterpret_cast<acc_t*>(published + 2 * now.slots), now.slots,
                        true};
                    if (first)
                        copy_matrix(Clusters(all), Matrix(sums), Matrix(resident));
                    sums = resident;
                    if (!first) break;
                }
            }
            // Merge, then bring every row that is left up to date.
            plan_round(all, now, method, scratch);
            if (now.done) break;
            if (first) record_merges(Clusters(all), Tree(tree), now.joined, now.made);
            next_rows(all, sums, now, sums.dense ? 0 : block,
                      sums.dense ? 1 : num_blocks,
                      published + (1 - buffer) * all.num_slots, method, neighbours);
        }
        // Only the first block knows the merges that it made alone: give their number
        // and heights to the others, which help to sort and write the rows.
        if (sums.dense) {
            if (first && threadIdx.x == 0) *tree.made() = now.made;
            sync();
            const int before = now.made;
            now.made = *tree.made();
            for (int t = before + threadIdx.x; t < now.made; t += blockDim.x)
                all.heights[t] = tree.height()[t];
            __syncthreads();
        }
        // Rank the merges by height. A warp ranks one merge.
        for (int t = warp; t < now.made; t += warps) {
            const int rank = static_cast<int>(merge_rank(all.heights, now.made, t));
            if (threadIdx.x % 32 == 0) tree.rank()[t] = rank;
        }
        sync();
        write_rows(Tree(tree), now.made, num_tokens, method, warp, warps,
                   out + b * (num_tokens - 1) * 4);
        if (first && threadIdx.x == 0) rounds[b] = now.rounds;
        sync();  // before the next sequence reuses the team's memory
    }
}
