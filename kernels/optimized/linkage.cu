// Average, complete and ward linkage in rounds: in one round, all pairs of clusters
// that are each other's nearest neighbours merge. Let A and B be such a pair, and let
// another such pair, C and D, merge first. Each distance d defined below satisfies
//   d(C u D, A) >= min(d(C, A), d(D, A)) >= d(B, A),
// and the same is true for B. So A and B stay each other's nearest neighbours until
// they merge. The standard greedy algorithm, which always merges the closest pair,
// therefore makes the same merge, and all such pairs may merge in one round.
//
//   E(A, C) = sum of m_a m_c (1 - cos_ac) over all tokens a in A and c in C
//   E(A u B, C) = E(A, C) + E(B, C)         E is additive
//   average   E / (W_A W_C)                 W: the sum of a cluster's masses m
//   complete  the largest 1 - cos           E is this maximum instead of the sum
//   ward      2 W_A W_C / (W_A + W_C) |mu_A - mu_C|^2; the height is its square root
//   |mu_A - mu_C|^2 = 2 E(A, C) / (W_A W_C) - E(A, A) / W_A^2 - E(C, C) / W_C^2
//
// mu is the mean of a cluster's unit tokens, weighted by their masses. If no masses are
// given, every m is 1.
//
// A slot is the index of a cluster in the arrays of `Clusters`. The matrix has
// E(A, C) for each pair of clusters. The row of a cluster is that of its first token;
// rows do not move while the matrix is in global memory. Its column is that of its
// slot, which is its token at first. When half of the slots are empty, the columns in
// use are moved to the left, without gaps, except if the matrix is in shared memory.
//
// Threads: a team of blocks works on one sequence. Each block keeps its own copy of all
// clusters and plans every round itself. All blocks plan from the same data, so they
// reach the same plan without exchanging it. The blocks synchronise once in a round, to
// exchange the nearest clusters, and once more when columns move. When the remaining
// clusters fit the shared memory of one block, the first block continues alone. The
// other blocks wait until the first block has finished; then they help to sort and
// write the dendrogram. A row with few changes takes one warp or a part of it; several
// warps may search one row together. `team_warp` is the index of a warp among the
// `team_warps` warps of a team.
//
// linkage.cuh defines `Neighbour` and the order of pairs, linkage_clusters.cuh the
// clusters. linkage_columns.cuh moves columns, and linkage_rows.cuh updates and
// searches rows.

// Three counts of clusters in a round: kept (not absorbed), new (they absorb another
// cluster) and searched (their rows need a search). Each count has 21 bits of one
// number, so one prefix sum adds all three. A count is below 2^21, because the matrix
// of 2^21 tokens would take 16 TiB.
struct ClusterCounts {
    unsigned long long packed;

    __device__ void add(int kept, int new_ones, int searched) {
        packed += kept | (unsigned long long)new_ones << 21 |
                  (unsigned long long)searched << 42;
    }
    __device__ int kept() const { return packed & 0x1FFFFF; }
    __device__ int new_ones() const { return packed >> 21 & 0x1FFFFF; }
    __device__ int searched() const { return static_cast<int>(packed >> 42); }
};

// Return the counts of the warps before this one; `total` receives those of all warps.
__device__ __forceinline__ ClusterCounts cluster_counts_before(
    ClusterCounts of_warp, unsigned long long* scratch, ClusterCounts* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = of_warp.packed;
    __syncthreads();
    unsigned long long all = lane < warps ? scratch[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long partial = __shfl_up_sync(~0u, all, step);
        if (lane >= step) all += partial;
    }
    total->packed = __shfl_sync(~0u, all, 31);
    const unsigned long long earlier = __shfl_sync(~0u, all, max(warp - 1, 0));
    return {warp > 0 ? earlier : 0};
}

// Set up one cluster for each token that may merge. The first block also sets up the
// nodes of the tree. Not inlined: an inlined copy would take registers from the rounds.
__device__ __noinline__ Progress init_clusters(Clusters& all, const Tree& tree,
                                               bool first_block, const acc_t* cosines,
                                               const acc_t* mass, const bool* mask,
                                               const bool* protect,
                                               long long num_tokens,
                                               long long num_groups, acc_t* scratch) {
    acc_t largest = 0;
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i]))
            largest = max(largest, mass[i]);
    largest = block_reduce(largest, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        // The lower bound lets a token of mass 0 still join its nearest cluster.
        const acc_t relative_mass =
            largest > 0 ? max(mass[i] / largest, acc_t(LEAST_MASS)) : acc_t(1);
        all.slots()[i] = {1 / relative_mass, UNTOUCHED};
        all.masses()[i] = {relative_mass, 0};  // W, and E(A, A) / W^2
        all.first_token()[i] = static_cast<int>(i);
        // Not exactly 1 after rounding. `init_row` corrects the cosines by this factor.
        all.inverse_norms()[i] = inverse_norm(cosines[i * num_tokens + i]);
        if (!first_block) continue;
        tree.node()[i] = {0, static_cast<int>(i), 1};
    }
    int tokens;
    const int num_clusters =
        list_tokens(mask, protect, num_tokens, reinterpret_cast<int*>(scratch),
                    all.active(), &tokens);
    // Each protected token is a group of its own, so (all tokens) - K merges leave K
    // groups; at most clusters - 1 merges are possible.
    const long long wanted = min(tokens - num_groups, num_clusters - 1ll);
    if (threadIdx.x == 0)
        *constants() = {largest > 0 ? largest : acc_t(1), static_cast<int>(wanted)};
    __syncthreads();
    // num_clusters, num_new, num_searched, num_merges, rounds, num_columns, done
    return {num_clusters, 0, 0, 0, 0, static_cast<int>(num_tokens), wanted <= 0};
}

// What a round does to a cluster. `mate` is the slot that it absorbs; UNTOUCHED if it
// does not merge; or ABSORBED if its nearest cluster absorbs it. `searched` is true if
// its row needs a search over every column.
struct Change {
    int mate;
    bool searched;
};

// Slots i and j merge if each is the other's nearest. The lower slot keeps the new
// cluster. With j = nearest[i] and nearest_of_j = nearest[j] (-1 if there is none):
//   nearest_of_j == i            i and j merge; the new cluster needs a search
//   nearest[nearest_of_j] == j   j merges with another cluster, so i needs a search
//   nearest_of_j < 0             i or j has no nearest cluster (there is no other one,
//                                or all its distances are NaN or infinite): search i
__device__ __forceinline__ Change change_of(const int* nearest, int i) {
    const int j = nearest[i], nearest_of_j = j < 0 ? -1 : nearest[j];
    if (nearest_of_j == i) return {i < j ? j : ABSORBED, i < j};
    return {UNTOUCHED, nearest_of_j < 0 || nearest[nearest_of_j] == j};
}

// Return whether the `wanted_merges` lowest merges of the dendrogram have already been
// made. A later merge cannot be lower than the distance of the pair that is closest
// now. So the merges that are not higher than this distance (`least`) are final, and
// this function counts them.
__device__ bool is_enough(const Clusters& all, const Progress& now, int method,
                          acc_t* scratch) {
    acc_t least = -MASKED_SCORE, lower = 0;  // 1e30: no pair yet
    for (int p = threadIdx.x; p < now.num_clusters; p += blockDim.x) {
        const int i = all.active()[p], j = all.nearest()[i];
        if (j >= 0)
            least = min(least, distance(all.nearest_e()[i], all.side(i, method),
                                        all.side(j, method), method));
    }
    least = rounded_for_comparison(block_reduce(least, scratch, Least()));
    for (int t = threadIdx.x; t < now.num_merges; t += blockDim.x)
        lower += rounded_for_comparison(all.heights[t]) <= least;
    lower = block_reduce(lower, scratch, Add());
    __syncthreads();  // `plan_round` uses the scratch again
    return lower >= constants()->wanted_merges;
}

// Update this block's copy of the clusters: read the nearest clusters, which all blocks
// have published, and the heights of the last round's merges, which the first block has
// written. Not inlined, for the reason given at `init_clusters`.
__device__ __noinline__ void read_published(const Clusters& all, const acc_t* height,
                                            const NearestCluster* published,
                                            int num_clusters, int num_new,
                                            int num_merges) {
    const int threads = blockDim.x;
    for (int q = threadIdx.x; q < num_new; q += threads) {
        const int t = num_merges - num_new + q;
        all.heights[t] = height[t];
    }
    for (int p0 = threadIdx.x; p0 < num_clusters; p0 += threads * EXCHANGE_LOADS) {
        NearestCluster loaded[EXCHANGE_LOADS];
        // All loads come first, because the compiler cannot move a load above an
        // earlier store.
#pragma unroll
        for (int k = 0; k < EXCHANGE_LOADS; ++k)
            if (p0 + threads * k < num_clusters)
                loaded[k] = published[all.active()[p0 + threads * k]];
#pragma unroll
        for (int k = 0; k < EXCHANGE_LOADS; ++k) {
            if (p0 + threads * k >= num_clusters) break;
            const int i = all.active()[p0 + threads * k];
            all.nearest()[i] = loaded[k].slot;
            all.nearest_e()[i] = loaded[k].e;
        }
    }
    __syncthreads();  // `plan_round` reads the clusters of other threads
}

// Slot i absorbs slot j, its mate. Update the values of slot i:
//   W = W_A + W_B,   E(A u B, A u B) = E(A, A) + E(B, B) + 2 E(A, B)
// `spread` is E(A, A) / W_A^2, `e_within` E(A, A) + E(B, B). nearest_e[i] becomes the
// distance of the merge, for `record_merges`. Not inlined, as said at `init_clusters`.
__device__ __noinline__ void merge_slots(SlotValues* slots, Mass* masses,
                                         acc_t* nearest_e, int i, int method) {
    const int j = slots[i].mate;
    const Mass a = masses[i], b = masses[j];
    const acc_t e = nearest_e[i], total_mass = a.mass + b.mass;
    const acc_t e_within = a.spread * a.mass * a.mass + b.spread * b.mass * b.mass;
    nearest_e[i] = distance(e, {slots[i].inverse_mass, a.spread},
                            {slots[j].inverse_mass, b.spread}, method);
    masses[i] = {total_mass, (e_within + 2 * e) / (total_mass * total_mass)};
    slots[i].inverse_mass = 1 / total_mass;
}

// Merge all pairs that are each other's nearest neighbours. The first pass counts what
// happens to the clusters of each warp. The second pass writes the lists `next_active`,
// `new_clusters` and `search_order`. The first two have the order of `active`. So has
// each of the two parts of `search_order`: rows that need a search, then the others.
// Every block does this and reaches the same result. No barrier is needed between the
// reads of `nearest` and the merges: a merge of slot j into slot i reads both slots and
// writes only slot i, and `nearest` does not change.
__device__ void plan_round(Clusters& all, Progress& now, int method, acc_t* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int per_warp = (now.num_clusters + 32 * warps - 1) / (32 * warps) * 32;
    const int start = min(warp * per_warp, now.num_clusters);
    const int stop = min(start + per_warp, now.num_clusters);
    const auto change = [&](int p) {
        return p < stop ? change_of(all.nearest(), all.active()[p])
                        : Change{ABSORBED, false};
    };
    ClusterCounts of_warp = {0}, total;
    for (int p0 = start; p0 < stop; p0 += 32) {
        const Change x = change(p0 + lane);
        of_warp.add(__popc(__ballot_sync(~0u, x.mate != ABSORBED)),
                    __popc(__ballot_sync(~0u, x.mate >= 0)),
                    __popc(__ballot_sync(~0u, x.searched)));
    }
    auto* sum_scratch = reinterpret_cast<unsigned long long*>(scratch);
    ClusterCounts before_warp = cluster_counts_before(of_warp, sum_scratch, &total);
    for (int p0 = start; p0 < stop; p0 += 32) {
        const Change x = change(p0 + lane);
        const unsigned kept = __ballot_sync(~0u, x.mate != ABSORBED);
        const unsigned new_ones = __ballot_sync(~0u, x.mate >= 0);
        const unsigned searched = __ballot_sync(~0u, x.searched);
        const unsigned lower_lanes = (1u << lane) - 1;
        if (x.mate != ABSORBED) {
            const int i = all.active()[p0 + lane];
            const int position = before_warp.kept() + __popc(kept & lower_lanes);
            const int search_position =
                before_warp.searched() + __popc(searched & lower_lanes);
            all.next_active()[position] = i;
            // A cluster without a search comes after all clusters with one. `position -
            // search_position` is the number of clusters without a search before this
            // one.
            all.search_order()[x.searched
                                   ? search_position
                                   : total.searched() + position - search_position] = i;
            all.slots()[i].mate = x.mate;
            if (x.mate >= 0) {
                all.new_clusters()[before_warp.new_ones() +
                                   __popc(new_ones & lower_lanes)] = i;
                merge_slots(all.slots(), all.masses(), all.nearest_e(), i, method);
            }
        }
        before_warp.add(__popc(kept), __popc(new_ones), __popc(searched));
    }
    all.active_list = 1 - all.active_list;
    now.num_clusters = total.kept();
    now.num_new = total.new_ones();
    now.num_searched = total.searched();
    now.num_merges += now.num_new;
    now.rounds += 1;
    now.done = now.num_new == 0;
    __syncthreads();  // the lists are complete
}

// One block: write this round's merges. The merges are assigned from the last thread
// backwards, because the last warps have the fewest rows to search. Not inlined, for
// the reason given at `init_clusters`.
__device__ __noinline__ void record_merges(const Clusters& all, const Tree& tree,
                                           int num_new, int num_merges) {
    for (int q = blockDim.x - 1 - threadIdx.x; q < num_new; q += blockDim.x) {
        const int i = all.new_clusters()[q], t = num_merges - num_new + q;
        Node& node = tree.node()[all.first_token()[i]];
        const Node left = node,
                   right = tree.node()[all.first_token()[all.slots()[i].mate]];
        // Rounding could make a merge lower than the merges of its parts.
        const acc_t height = max(all.nearest_e()[i], max(left.height, right.height));
        const int tokens = left.tokens + right.tokens;
        node = {height, tree.num_tokens + t, tokens};
        tree.height()[t] = height;
        tree.merge()[t] = {left.index, right.index, tokens};
    }
}

// One warp: write rows of the dendrogram, sorted by height: merge t becomes row
// rank[t]. During the rounds the node of merge t has the index N + t; in the dendrogram
// it has the index N + rank[t]. Rows from `num_merges` on have no merge. Not inlined,
// for the reason given at `init_clusters`.
__device__ __noinline__ void write_dendrogram(const Tree& tree, int num_merges,
                                              long long num_tokens, int method,
                                              int team_warp, int team_warps,
                                              double* out) {
    const long long team_threads = team_warps * 32;
    for (long long t = team_warp * 32 + threadIdx.x % 32; t < num_tokens - 1;
         t += team_threads) {
        if (t >= num_merges) {
            store_no_row(out, t);
            continue;
        }
        const Merge merge = tree.merge()[t];
        const auto renumbered = [&](int node) {
            return node < num_tokens ? node
                                     : num_tokens + tree.rank()[node - num_tokens];
        };
        const double height = tree.height()[t];
        store_row(
            out, tree.rank()[t], renumbered(merge.left), renumbered(merge.right),
            method == WARD ? sqrt(height * double(constants()->mass_unit)) : height,
            merge.tokens);
    }
}

// `matrix` (B, N, N) holds the cosines and is overwritten by E, except if `in_shared`:
// then the matrix (N, N) of a sequence is in shared memory, as are the published
// nearest clusters. A team of `blocks_per_sequence` blocks works on a sequence until at
// most `max_alone` clusters are left. These clusters and their matrix fit in the shared
// memory of one block, so the first block continues alone.
//
// Each team has one entry in these arrays: `trees` (the merges, which become a
// dendrogram), `exchange` (2, N) (the nearest clusters that blocks publish, in two
// buffers) and `arrived` (the counter of its barrier, 0 at first). `states` has the
// clusters of every block; it is null if the clusters are in shared memory.
// Other shapes: mass, mask and protect (B, N), counts (B,), out (B, N - 1, 4), rounds
// (B,), which receives the number of rounds.
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    linkage(acc_t* matrix, const acc_t* mass, const bool* mask, const bool* protect,
            const int* counts, long long batch, long long num_tokens,
            long long num_groups, long long method, long long in_shared,
            long long max_alone, long long blocks_per_sequence, long long state_bytes,
            long long tree_bytes, unsigned char* trees, unsigned char* exchange,
            unsigned char* states, unsigned* arrived, double* out, int* rounds) {
    // Order in shared memory: scratch, state, exchange, matrix. The last three are
    // there only if they fit.
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());
    auto* neighbours = reinterpret_cast<Neighbour*>(scratch);
    auto* shared = reinterpret_cast<unsigned char*>(scratch + LINKAGE_SCRATCH);
    unsigned char* state = states ? states + blockIdx.x * state_bytes : shared;
    const long long height_bytes = aligned_bytes(num_tokens * sizeof(acc_t));
    // `state` has the heights of the merges, then the clusters. When the first block
    // continues alone, it moves the clusters, not the heights, to `shared`.
    if (!states) shared += height_bytes;
    const int num_blocks = static_cast<int>(blocks_per_sequence),
              n = static_cast<int>(num_tokens);
    const int team = blockIdx.x / num_blocks, num_teams = gridDim.x / num_blocks;
    const int team_block = blockIdx.x % num_blocks;
    const bool first_block = team_block == 0;
    const int team_warps = num_blocks * (blockDim.x / 32);
    const int team_warp = threadIdx.x / 32 * num_blocks + team_block;
    if (team >= num_teams) return;  // this block's team is not complete
    const Tree tree = {trees + team * tree_bytes, n};
    const auto sync = [&] {
        if (num_blocks > 1)
            blocks_barrier(arrived + team, num_blocks);
        else
            __syncthreads();
    };
    for (long long b = team; b < batch; b += num_teams) {
        const long long sequence_start = b * num_tokens;  // in (B, N)
        acc_t* cosines = matrix + sequence_start * num_tokens;
        // Functions that are not inlined take addresses, and a variable whose address
        // is taken does not stay in a register. So the functions get the addresses of
        // copies: here `initial`, and below temporaries such as Clusters(all).
        Clusters initial = {reinterpret_cast<acc_t*>(state), state + height_bytes, n,
                            0};
        // Two buffers in turn, for the reason given in linkage_rows.cuh.
        NearestCluster* published =
            in_shared
                ? reinterpret_cast<NearestCluster*>(state + state_bytes)
                : reinterpret_cast<NearestCluster*>(exchange) + team * 2 * num_tokens;
        Matrix e_matrix = {
            in_shared ? reinterpret_cast<acc_t*>(published + 2 * num_tokens) : cosines,
            num_tokens, false};
        Progress now =
            init_clusters(initial, Tree(tree), first_block, cosines,
                          mass ? mass + sequence_start : nullptr,
                          mask ? mask + sequence_start : nullptr,
                          protect ? protect + sequence_start : nullptr, num_tokens,
                          count_of(counts, b, num_groups), scratch);
        for (int p = team_warp; p < now.num_clusters && !now.done; p += team_warps) {
            const int i = initial.active()[p];
            init_row(initial, cosines + i * num_tokens, e_matrix.data + i * num_tokens,
                     i, now.num_clusters, method, published);
        }
        Clusters all = initial;
        while (!now.done) {
            // Wait until every row's nearest cluster is published.
            if (e_matrix.moved_to_shared)
                __syncthreads();
            else
                sync();
            const int buffer = now.rounds % 2;
            read_published(Clusters(all), tree.height(),
                           published + buffer * all.num_slots, now.num_clusters,
                           now.num_new, now.num_merges);
            if (now.num_merges >= constants()->wanted_merges &&
                is_enough(all, now, method, scratch))
                break;
            // Move columns when half of the slots are empty, or for the last time
            // (`last_move`) when the remaining clusters fit one block.
            const bool last_move = num_blocks > 1 && now.num_clusters <= max_alone;
            if (!in_shared && !e_matrix.moved_to_shared &&
                (last_move || now.num_clusters <= now.num_columns / 2)) {
                move_columns(all, e_matrix, now.num_clusters, team_warp, team_warps);
                now.num_columns = now.num_clusters;
                unsigned char* new_state = last_move ? shared : all.state;
                const int room = last_move ? now.num_columns : all.num_slots;  // slots
                renumber(all, now.num_columns, new_state, room);
                all = {all.heights, new_state, room, 1 - all.active_list};
                sync();
                if (last_move) {
                    // Clusters, `published` and matrix move to shared memory.
                    published = reinterpret_cast<NearestCluster*>(
                        shared + aligned_bytes(now.num_columns * SLOT_BYTES));
                    const Matrix shared_matrix = {
                        reinterpret_cast<acc_t*>(published + 2 * now.num_columns),
                        now.num_columns, true};
                    if (first_block)
                        copy_matrix(Clusters(all), Matrix(e_matrix),
                                    Matrix(shared_matrix));
                    e_matrix = shared_matrix;
                    if (!first_block) break;  // wait after the loop
                }
            }
            plan_round(all, now, method, scratch);
            if (now.done) break;
            if (first_block)
                record_merges(Clusters(all), Tree(tree), now.num_new, now.num_merges);
            update_rows(all, e_matrix, now, e_matrix.moved_to_shared ? 0 : team_block,
                        e_matrix.moved_to_shared ? 1 : num_blocks,
                        published + (1 - buffer) * all.num_slots, method, neighbours);
        }
        // Only the first block knows the merges that it made alone. The first block
        // gives the number and the heights of these merges to the other blocks, which
        // help to sort and write the rows.
        if (e_matrix.moved_to_shared) {
            if (first_block && threadIdx.x == 0) *tree.num_merges() = now.num_merges;
            sync();
            const int old_merges = now.num_merges;
            now.num_merges = *tree.num_merges();
            for (int t = old_merges + threadIdx.x; t < now.num_merges; t += blockDim.x)
                all.heights[t] = tree.height()[t];
            __syncthreads();
        }
        // Rank the merges by height. A warp ranks one merge.
        for (int t = team_warp; t < now.num_merges; t += team_warps) {
            const int rank =
                static_cast<int>(merge_rank(all.heights, now.num_merges, t));
            if (threadIdx.x % 32 == 0) tree.rank()[t] = rank;
        }
        sync();
        write_dendrogram(Tree(tree), now.num_merges, num_tokens, method, team_warp,
                         team_warps, out + b * (num_tokens - 1) * 4);
        if (first_block && threadIdx.x == 0) rounds[b] = now.rounds;
        sync();  // before the next sequence reuses the team's memory
    }
}
