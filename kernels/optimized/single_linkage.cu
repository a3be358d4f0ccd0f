// Single linkage by Boruvka's algorithm (1926). In each round, every component (the
// tokens joined so far) finds the shortest edge that leaves it, and all components join
// along these edges at once. Each round therefore at least halves their number. The
// edges are those of the minimum spanning tree. Sorted by length, each edge is a merge
// of the dendrogram.
//
//   distance of clusters A and C = the smallest 1 - cos of a in A and c in C
//
// Reciprocal nearest neighbours would give the same result. But in single linkage, one
// large cluster often absorbs its neighbours one after another, and each of these
// merges would need a round.
//
// Threads: a team of blocks works on one sequence. A warp finds the nearest token
// outside for one token; the first block joins the components. Equal lengths are
// ordered by the hash of the pair, one strict order of all edges, so no cycle can form.

constexpr unsigned long long NO_EDGE = ~0ull;

// The state of a sequence between rounds: arrays (N,), in the order they have in
// memory.
struct Components {
    unsigned long long *length, *number;  // of a component's shortest edge: bits, hash
    acc_t* scale;                         // 1 / |x| of the token
    acc_t* distance;                      // to the nearest token outside its component
    acc_t* height;                        // of edge t of the tree
    int* nearest;                         // that token
    int* component;        // of a token: the first token of its component
    int* winner;           // of a component: the token at the start of its edge
    int* parent;           // of a component: the component that it joins
    int *active, *sorted;  // tokens that take part; edges by length
    int *from, *to;        // of edge t

    __device__ Components(unsigned long long* words, acc_t* reals, int* integers,
                          long long n)
        : length(words),
          number(words + n),
          scale(reals),
          distance(reals + n),
          height(reals + 2 * n),
          nearest(integers),
          component(integers + n),
          winner(integers + 2 * n),
          parent(integers + 3 * n),
          active(integers + 4 * n),
          sorted(integers + 5 * n),
          from(integers + 6 * n),
          to(integers + 7 * n) {}
};
static_assert(sizeof(Components) ==
              (SINGLE_WORDS + SINGLE_REALS + SINGLE_INTEGERS) * sizeof(int*));

// The progress of a sequence, which the first block publishes to the others.
struct TreeProgress {
    int tokens, edges;  // tokens that take part; edges so far
    int rounds, done;
};
static_assert(sizeof(TreeProgress) == SINGLE_PROGRESS * sizeof(int));

// Return the bits of a distance >= 0 as an integer. Such integers have the order of the
// distances, and an integer atomic can find the least.
__device__ __forceinline__ unsigned long long distance_bits(acc_t distance) {
    return static_cast<unsigned long long>(
        __double_as_longlong(static_cast<double>(distance)));
}

// One block: make each token a component of its own.
__device__ void init_components(Components& all, TreeProgress* published,
                                const acc_t* cosines, const bool* mask,
                                const bool* protect, long long num_tokens,
                                long long num_groups, int* ranks) {
    int tokens;
    const int free = list_tokens(mask, protect, num_tokens, ranks, all.active, &tokens);
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        all.component[i] = all.parent[i] = static_cast<int>(i);
        all.scale[i] = inverse_length(cosines[i * num_tokens + i]);
    }
    if (threadIdx.x == 0) *published = {free, 0, 0, tokens <= num_groups || free < 2};
}

// One warp: find the nearest token of another component for token i.
__device__ void find_edge(Components& all, const acc_t* cosines, int i, int tokens) {
    const int own = all.component[i];
    const acc_t scale = all.scale[i];
    Neighbour best = no_neighbour();
    for (int p = threadIdx.x % 32; p < tokens; p += 32) {
        const int j = all.active[p];
        const acc_t distance = cosine_distance(cosines[j] * (scale * all.scale[j]));
        const Neighbour other = {distance >= 0 ? distance : -padding(), 0, j};
        if (all.component[j] != own && nearer(nullptr, i, other, best)) best = other;
    }
    best = warp_nearest(nullptr, i, best);
    if (threadIdx.x % 32 == 0)
        all.nearest[i] = best.slot, all.distance[i] = best.distance;
}

// One block: join each component along the shortest edge that leaves it.
__device__ void join_components(Components& all, TreeProgress* published, int* ranks) {
    const int tokens = published->tokens;
    const auto for_each_token = [&](auto&& step) {
        for (int p = threadIdx.x; p < tokens; p += blockDim.x) step(all.active[p]);
        __syncthreads();
    };
    // Find each component's edge: the least length, then the least hash at that length.
    for_each_token(
        [&](int i) { all.length[i] = all.number[i] = NO_EDGE, all.winner[i] = -1; });
    for_each_token([&](int i) {
        if (all.nearest[i] >= 0)
            atomicMin(all.length + all.component[i], distance_bits(all.distance[i]));
    });
    const auto is_shortest = [&](int i) {
        return all.nearest[i] >= 0 &&
               distance_bits(all.distance[i]) == all.length[all.component[i]];
    };
    for_each_token([&](int i) {
        if (is_shortest(i))
            atomicMin(all.number + all.component[i], pair_number(i, all.nearest[i]));
    });
    for_each_token([&](int i) {  // one token per component: hashes differ
        if (is_shortest(i) &&
            pair_number(i, all.nearest[i]) == all.number[all.component[i]])
            all.winner[all.component[i]] = i;
    });

    int edges = published->edges;
    for (int p0 = 0; p0 < tokens; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const int own =
            p < tokens ? all.active[p] : -1;  // perhaps the first token of a component
        const int i = own < 0 ? -1 : all.winner[own];
        bool joins = i >= 0;
        if (joins) {
            // If two components select the same edge, the one with the higher first
            // token joins the other, so that the edge counts once.
            const int other = all.component[all.nearest[i]];
            joins = all.winner[other] != all.nearest[i] ||
                    all.nearest[all.winner[other]] != i || other < own;
            if (joins) all.parent[own] = other;
        }
        int count;
        const int t = edges + block_rank(joins, ranks, &count);
        edges += count;
        if (!joins) continue;
        all.height[t] = all.distance[i];
        all.from[t] = i, all.to[t] = all.nearest[i];
    }
    __syncthreads();
    // Give every token the root of its joined components.
    for_each_token([&](int i) {
        int root = all.component[i];
        while (all.parent[root] != root) root = all.parent[root];
        all.component[i] = root;
    });
    if (threadIdx.x > 0) return;
    const bool done = edges == published->edges || edges == tokens - 1;
    *published = {tokens, edges, published->rounds + 1, done};
}

// Return the root of token i's component, and halve the path to it for later calls.
__device__ int find_root(int* parent, int i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
}

// One block: write the edges, sorted by length, as merges. One thread joins them in
// order, with the components in `state` (3N,), which is fastest in shared memory.
__device__ void write_rows(const Components& all, int edges, long long num_tokens,
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
        const int t = all.sorted[row];
        const int a = find_root(parent, all.from[t]);
        const int b = find_root(parent, all.to[t]);
        size[a] += size[b];
        store_row(out, row, node[a], node[b], all.height[t], size[a]);
        parent[b] = a;
        node[a] = static_cast<int>(num_tokens) + row;
    }
}

// The arguments are those of linkage.cu, except that cosines (B, N, N) are not changed.
// `words`, `reals`, `integers` (`Components`) and `progress` (`TreeProgress`) have one
// entry for each team. If `in_shared`, there is shared memory for 3N integers.
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    single_linkage(const acc_t* cosines, const bool* mask, const bool* protect,
                   const int* counts, long long batch, long long num_tokens,
                   long long num_groups, long long in_shared,
                   long long blocks_per_sequence, unsigned long long* words,
                   acc_t* reals, int* integers, int* progress, unsigned* arrived,
                   double* out, int* rounds) {
    int* ranks = reinterpret_cast<int*>(dynamic_shared());  // 32
    const int num_blocks = static_cast<int>(blocks_per_sequence);
    const int team = blockIdx.x / num_blocks, num_teams = gridDim.x / num_blocks;
    const bool first = blockIdx.x % num_blocks == 0;
    const int warps = num_blocks * (blockDim.x / 32);
    const int warp = blockIdx.x % num_blocks * (blockDim.x / 32) + threadIdx.x / 32;
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
        const long long row = b * num_tokens;  // of (B, N)
        if (first)
            init_components(all, published, cosines + row * num_tokens,
                            mask ? mask + row : nullptr,
                            protect ? protect + row : nullptr, num_tokens,
                            count_of(counts, b, num_groups), ranks);
        sync();
        TreeProgress now = *published;
        while (!now.done) {
            for (int p = warp; p < now.tokens; p += warps) {
                const int i = all.active[p];
                find_edge(all, cosines + (row + i) * num_tokens, i, now.tokens);
            }
            sync();  // every token's edge is there
            if (first) join_components(all, published, ranks);
            sync();
            now = *published;
        }
        for (int t = warp; t < now.edges; t += warps) {
            const long long rank = merge_rank(all.height, now.edges, t);
            if (threadIdx.x % 32 == 0) all.sorted[rank] = t;
        }
        sync();
        if (first) {
            int* state = in_shared ? ranks + 32 : all.nearest;  // of no more use
            write_rows(all, now.edges, num_tokens, state,
                       out + b * (num_tokens - 1) * 4);
            if (threadIdx.x == 0) rounds[b] = now.rounds;
        }
        sync();  // before the next sequence reuses the team's memory
    }
}
