// Single linkage by Boruvka's algorithm (1926). In each round, every component
// (the tokens joined so far) finds the shortest edge that leaves it, and all components
// join along these edges at once. Each round therefore at least halves the number of
// components. The edges are those of the minimum spanning tree. Sorted by length, each
// edge is a merge of the dendrogram.
//
//   distance of clusters A and C = the smallest 1 - cos of a in A and c in C
//
// Merging clusters that are each other's nearest neighbours, as linkage.cu does, would
// give the same result. But in single linkage, one large cluster often absorbs its
// neighbours one after another, and each of these merges would need a round.
//
// Threads: a team of blocks works on one sequence. A warp finds, for one token, the
// nearest token of another component; the first block joins the components. Equal
// lengths are ordered by the hash of the pair (linkage.cuh). This is one strict order
// of all edges, so no cycle can form. `Neighbour`, `list_tokens`, `merge_rank` and
// `store_row` are also in linkage.cuh.

constexpr unsigned long long NO_EDGE = ~0ull;

// The state of a sequence between rounds: arrays (N,), in the order of their memory.
// The warps of all blocks write `nearest`, `nearest_distance` and `by_length`; the
// first block writes the other arrays. All blocks read `active`, `component`,
// `inverse_norms` and `edge_height`. `edge_length` (as `distance_bits`), `edge_hash`,
// `edge_start` and `parent` are indexed by component; `edge_height`, `from` and `to` by
// edge of the tree.
struct Components {
    unsigned long long *edge_length, *edge_hash;  // of the shortest edge of a component
    acc_t* inverse_norms;                         // 1 / |x| of a token
    acc_t* nearest_distance;  // distance of a token to its `nearest`
    acc_t* edge_height;       // length of edge t of the tree
    int* nearest;             // nearest token outside the component
    int* component;           // root of a token's component, one of its tokens
    int* edge_start;          // token where the shortest edge of a component starts
    int* parent;              // component that a component joins
    int *active, *by_length;  // tokens that take part; edges sorted by length
    int *from, *to;           // both ends of edge t

    __device__ Components(unsigned long long* words, acc_t* reals, int* integers,
                          long long n)
        : edge_length(words),
          edge_hash(words + n),
          inverse_norms(reals),
          nearest_distance(reals + n),
          edge_height(reals + 2 * n),
          nearest(integers),
          component(integers + n),
          edge_start(integers + 2 * n),
          parent(integers + 3 * n),
          active(integers + 4 * n),
          by_length(integers + 5 * n),
          from(integers + 6 * n),
          to(integers + 7 * n) {}
};
static_assert(sizeof(Components) ==
              (SINGLE_WORDS + SINGLE_REALS + SINGLE_INTEGERS) * sizeof(int*));

// The progress of a sequence, which the first block publishes to the others.
struct TreeProgress {
    int num_active, edges;  // tokens that take part; edges so far
    int rounds, done;
};
static_assert(sizeof(TreeProgress) == SINGLE_PROGRESS * sizeof(int));

// Return the bits of a distance >= 0 as an integer. Such integers have the order of the
// distances, and an integer atomic can find the least.
__device__ __forceinline__ unsigned long long distance_bits(acc_t distance) {
    return static_cast<unsigned long long>(
        __double_as_longlong(static_cast<double>(distance)));
}

// One block: make each token a component of its own. `rank_scratch` is shared memory
// for 32 counts.
__device__ void init_components(Components& all, TreeProgress* published,
                                const acc_t* cosines, const bool* mask,
                                const bool* protect, long long num_tokens,
                                long long num_groups, int* rank_scratch) {
    int tokens;
    const int free =
        list_tokens(mask, protect, num_tokens, rank_scratch, all.active, &tokens);
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        all.component[i] = all.parent[i] = static_cast<int>(i);
        all.inverse_norms[i] = inverse_norm(cosines[i * num_tokens + i]);
    }
    if (threadIdx.x == 0) *published = {free, 0, 0, tokens <= num_groups || free < 2};
}

// One warp: find the nearest token of another component for token i. `cosines` (N,) is
// row i of the matrix.
__device__ void find_edge(Components& all, const acc_t* cosines, int i,
                          int num_active) {
    const int component_i = all.component[i];
    const acc_t inverse_norm_i = all.inverse_norms[i];
    Neighbour best = no_neighbour();
    for (int p = threadIdx.x % 32; p < num_active; p += 32) {
        const int j = all.active[p];
        const acc_t distance =
            cosine_distance(cosines[j] * (inverse_norm_i * all.inverse_norms[j]));
        const Neighbour other = {distance >= 0 ? distance : -padding(), 0, j};
        if (all.component[j] != component_i && nearer(nullptr, i, other, best))
            best = other;
    }
    best = warp_nearest(nullptr, i, best);
    if (threadIdx.x % 32 == 0)
        all.nearest[i] = best.slot, all.nearest_distance[i] = best.distance;
}

// One block: join each component along the shortest edge that leaves it.
__device__ void join_components(Components& all, TreeProgress* published,
                                int* rank_scratch) {
    const int num_active = published->num_active;
    const auto for_each_token = [&](auto&& step) {
        for (int p = threadIdx.x; p < num_active; p += blockDim.x) step(all.active[p]);
        __syncthreads();
    };
    // Find the shortest edge of each component: the least length, then the least hash
    // among the edges of that length. `for_each_token` ends with a barrier, so each
    // step reads the complete results of the step before it.
    for_each_token([&](int i) {
        all.edge_length[i] = all.edge_hash[i] = NO_EDGE, all.edge_start[i] = -1;
    });
    for_each_token([&](int i) {
        if (all.nearest[i] >= 0)
            atomicMin(all.edge_length + all.component[i],
                      distance_bits(all.nearest_distance[i]));
    });
    const auto is_shortest = [&](int i) {
        return all.nearest[i] >= 0 && distance_bits(all.nearest_distance[i]) ==
                                          all.edge_length[all.component[i]];
    };
    for_each_token([&](int i) {
        if (is_shortest(i))
            atomicMin(all.edge_hash + all.component[i], pair_hash(i, all.nearest[i]));
    });
    for_each_token([&](int i) {  // one token per component, as hashes differ
        if (is_shortest(i) &&
            pair_hash(i, all.nearest[i]) == all.edge_hash[all.component[i]])
            all.edge_start[all.component[i]] = i;
    });

    int edges = published->edges;
    for (int p0 = 0; p0 < num_active; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        // The index of a component is that of one of its tokens, the root. For any
        // other token, `edge_start` is -1.
        const int component = p < num_active ? all.active[p] : -1;
        const int i = component < 0 ? -1 : all.edge_start[component];
        bool joins = i >= 0;
        if (joins) {
            // If two components select the same edge, the one with the higher index
            // joins the other, so that the edge counts once.
            const int other = all.component[all.nearest[i]];
            joins = all.edge_start[other] != all.nearest[i] ||
                    all.nearest[all.edge_start[other]] != i || other < component;
            if (joins) all.parent[component] = other;
        }
        int count;
        const int t = edges + block_rank(joins, rank_scratch, &count);
        edges += count;
        if (!joins) continue;
        all.edge_height[t] = all.nearest_distance[i];
        all.from[t] = i, all.to[t] = all.nearest[i];
    }
    __syncthreads();  // all parents are known
    // Give every token the root of its component: the end of its chain of parents.
    // Parents are not changed here, so no barrier is needed between tokens.
    for_each_token([&](int i) {
        int root = all.component[i];
        while (all.parent[root] != root) root = all.parent[root];
        all.component[i] = root;
    });
    if (threadIdx.x > 0) return;
    const bool done = edges == published->edges || edges == num_active - 1;
    *published = {num_active, edges, published->rounds + 1, done};
}

// Return the root of token i's component, and halve the path to it for later calls.
__device__ int find_root(int* parent, int i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
}

// One block: write the edges, sorted by length, as merges. One thread joins the
// components in this order. `state` (3N,) has their parents, nodes and sizes; shared
// memory is the fastest place for `state`.
__device__ void write_dendrogram(const Components& all, int edges, long long num_tokens,
                                 int* state, double* out) {
    static_assert(SINGLE_ROW_INTEGERS == 3, "parent, node and size");
    int *parent = state, *node = state + num_tokens, *size = state + 2 * num_tokens;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        parent[i] = node[i] = static_cast<int>(i);
        size[i] = 1;
        if (edges <= i && i < num_tokens - 1) store_no_row(out, i);
    }
    __syncthreads();
    for (int row = 0; row < edges && threadIdx.x == 0; ++row) {
        const int t = all.by_length[row];
        const int a = find_root(parent, all.from[t]);
        const int b = find_root(parent, all.to[t]);
        size[a] += size[b];
        store_row(out, row, node[a], node[b], all.edge_height[t], size[a]);
        parent[b] = a;
        node[a] = static_cast<int>(num_tokens) + row;
    }
}

// The cosines (B, N, N) are not changed. The arrays of a `Components` are in `words`
// (teams, SINGLE_WORDS, N), `reals` (teams, SINGLE_REALS, N) and `integers` (teams,
// SINGLE_INTEGERS, N). `progress` has one `TreeProgress` for each team, and `arrived`
// the counter of its barrier, 0 at first. If `in_shared`, there is shared memory for 3N
// integers.
// Other shapes: mask and protect (B, N), counts and rounds (B,), out (B, N - 1, 4).
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    single_linkage(const acc_t* cosines, const bool* mask, const bool* protect,
                   const int* counts, long long batch, long long num_tokens,
                   long long num_groups, long long in_shared,
                   long long blocks_per_sequence, unsigned long long* words,
                   acc_t* reals, int* integers, int* progress, unsigned* arrived,
                   double* out, int* rounds) {
    int* rank_scratch = reinterpret_cast<int*>(dynamic_shared());
    const int num_blocks = static_cast<int>(blocks_per_sequence);
    const int team = blockIdx.x / num_blocks, num_teams = gridDim.x / num_blocks;
    const bool first_block = blockIdx.x % num_blocks == 0;
    const int team_warps = num_blocks * (blockDim.x / 32);
    const int team_warp =
        blockIdx.x % num_blocks * (blockDim.x / 32) + threadIdx.x / 32;
    if (team >= num_teams) return;  // this block's team is not complete
    Components all(words + team * SINGLE_WORDS * num_tokens,
                   reals + team * SINGLE_REALS * num_tokens,
                   integers + team * SINGLE_INTEGERS * num_tokens, num_tokens);
    TreeProgress* published = reinterpret_cast<TreeProgress*>(progress) + team;
    const auto sync = [&] {
        if (num_blocks > 1)
            blocks_barrier(arrived + team, num_blocks);
        else
            __syncthreads();
    };
    for (long long b = team; b < batch; b += num_teams) {
        const long long sequence_start = b * num_tokens;  // in (B, N)
        if (first_block)
            init_components(all, published, cosines + sequence_start * num_tokens,
                            mask ? mask + sequence_start : nullptr,
                            protect ? protect + sequence_start : nullptr, num_tokens,
                            count_of(counts, b, num_groups), rank_scratch);
        sync();
        TreeProgress now = *published;
        while (!now.done) {
            for (int p = team_warp; p < now.num_active; p += team_warps) {
                const int i = all.active[p];
                find_edge(all, cosines + (sequence_start + i) * num_tokens, i,
                          now.num_active);
            }
            sync();  // the nearest token of every token is known
            if (first_block) join_components(all, published, rank_scratch);
            sync();  // the components of the next round are known
            now = *published;
        }
        for (int t = team_warp; t < now.edges; t += team_warps) {
            const long long rank = merge_rank(all.edge_height, now.edges, t);
            if (threadIdx.x % 32 == 0) all.by_length[rank] = t;
        }
        sync();
        if (first_block) {
            // The 3N integers from `nearest` on are not needed any more.
            int* state = in_shared ? rank_scratch + 32 : all.nearest;
            write_dendrogram(all, now.edges, num_tokens, state,
                             out + b * (num_tokens - 1) * 4);
            if (threadIdx.x == 0) rounds[b] = now.rounds;
        }
        sync();  // before the next sequence reuses the team's memory
    }
}
