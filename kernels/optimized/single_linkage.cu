// Single linkage by Boruvka's rounds (1926): every component of the tokens joined so
// far finds the shortest edge that leaves it, and all of these edges join at once, so
// that the components at least halve. The edges are those of the minimum spanning tree;
// taken by length, each is a merge of the dendrogram.
//
// Reciprocal nearest neighbours would be as right, but one large cluster that takes in
// its neighbours one after another, as single linkage does, would make a round of each.

constexpr unsigned long long NO_EDGE = ~0ull;

// The state of a sequence between rounds, in the order it lies in: (N,) each.
struct Components {
    unsigned long long *length, *number;  // of the shortest edge that leaves it
    acc_t* scale;                         // 1 / |x| of the token
    acc_t* distance;                      // of the nearest token outside
    acc_t* height;                        // of edge t of the tree
    int* nearest;                         // the token itself
    int* component;        // of a token: that one's first token, at first
    int* winner;           // the token where that edge begins
    int* parent;           // of a component: what it joins
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

// What the first block of a sequence tells the others.
struct TreeProgress {
    int tokens, edges;  // that take part, found so far
    int rounds, done;
};
static_assert(sizeof(TreeProgress) == SINGLE_PROGRESS * sizeof(int));

// Bits that are in order as distances >= 0 are.
__device__ __forceinline__ unsigned long long distance_bits(acc_t distance) {
    return static_cast<unsigned long long>(
        __double_as_longlong(static_cast<double>(distance)));
}

// Every token is a component.
__device__ void begin(Components& all, TreeProgress* told, const acc_t* cosines,
                      const bool* mask, const bool* protect, long long num_tokens,
                      long long num_groups, int* ranks) {
    int tokens;
    const int free = list_tokens(mask, protect, num_tokens, ranks, all.active, &tokens);
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        all.component[i] = all.parent[i] = static_cast<int>(i);
        all.scale[i] = inverse_length(cosines[i * num_tokens + i]);
    }
    if (threadIdx.x == 0) *told = {free, 0, 0, tokens <= num_groups || free < 2};
}

// One warp: the nearest token of another component.
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

// Join each component along the shortest edge that leaves it.
__device__ void join_components(Components& all, TreeProgress* told, int* ranks) {
    const int tokens = told->tokens;
    const auto each = [&](auto&& step) {
        for (int p = threadIdx.x; p < tokens; p += blockDim.x) step(all.active[p]);
        __syncthreads();
    };
    each([&](int i) { all.length[i] = all.number[i] = NO_EDGE, all.winner[i] = -1; });
    each([&](int i) {
        if (all.nearest[i] >= 0)
            atomicMin(all.length + all.component[i], distance_bits(all.distance[i]));
    });
    const auto is_shortest = [&](int i) {
        return all.nearest[i] >= 0 &&
               distance_bits(all.distance[i]) == all.length[all.component[i]];
    };
    each([&](int i) {
        if (is_shortest(i))
            atomicMin(all.number + all.component[i], pair_number(i, all.nearest[i]));
    });
    each([&](int i) {  // one token: a number belongs to one pair
        if (is_shortest(i) &&
            pair_number(i, all.nearest[i]) == all.number[all.component[i]])
            all.winner[all.component[i]] = i;
    });

    int edges = told->edges;
    for (int p0 = 0; p0 < tokens; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const int own = p < tokens ? all.active[p] : -1;  // a component's first token?
        const int i = own < 0 ? -1 : all.winner[own];
        bool joins = i >= 0;
        if (joins) {  // of two that choose the same edge, the second joins the first
            const int other = all.component[all.nearest[i]];
            joins = all.winner[other] != all.nearest[i] ||
                    all.nearest[all.winner[other]] != i || other < own;
            if (joins) all.parent[own] = other;
        }
        int found;
        const int t = edges + block_rank(joins, ranks, &found);
        edges += found;
        if (!joins) continue;
        all.height[t] = all.distance[i];
        all.from[t] = i, all.to[t] = all.nearest[i];
    }
    __syncthreads();
    each([&](int i) {
        int root = all.component[i];
        while (all.parent[root] != root) root = all.parent[root];
        all.component[i] = root;
    });
    if (threadIdx.x > 0) return;
    const bool done = edges == told->edges || edges == tokens - 1;
    *told = {tokens, edges, told->rounds + 1, done};
}

// The component that token i is in, once some edges are taken; halves the way to it.
__device__ int find_root(int* parent, int i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
}

// One block: the edges by length are the merges. One thread takes them one by one, with
// the components in `state` (3N,), which is fastest in shared memory.
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

// As in linkage.cu; cosines (B, N, N) stay as they are. There may be shared memory for
// 3N integers.
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    single_linkage(const acc_t* cosines, const bool* mask, const bool* protect,
                   const int* counts, long long batch, long long num_tokens,
                   long long num_groups, long long in_shared, long long blocks,
                   unsigned long long* words, acc_t* reals, int* integers, int* plans,
                   unsigned* arrived, double* out, int* rounds) {
    int* ranks = reinterpret_cast<int*>(dynamic_shared());  // 32
    const int share = static_cast<int>(blocks);
    const int place = blockIdx.x / share, places = gridDim.x / share;
    const bool first = blockIdx.x % share == 0;
    const int warps = share * (blockDim.x / 32);
    const int warp = blockIdx.x % share * (blockDim.x / 32) + threadIdx.x / 32;
    if (place >= places) return;  // of a group that is not whole
    Components all(words + place * SINGLE_WORDS * num_tokens,
                   reals + place * SINGLE_REALS * num_tokens,
                   integers + place * SINGLE_INTEGERS * num_tokens, num_tokens);
    TreeProgress* told = reinterpret_cast<TreeProgress*>(plans) + place;
    const auto meet = [&] {
        if (share > 1)
            blocks_barrier(arrived + place, share);
        else
            __syncthreads();
    };
    for (long long b = place; b < batch; b += places) {
        const long long row = b * num_tokens;  // of (B, N)
        if (first)
            begin(all, told, cosines + row * num_tokens, mask ? mask + row : nullptr,
                  protect ? protect + row : nullptr, num_tokens,
                  count_of(counts, b, num_groups), ranks);
        meet();
        TreeProgress now = *told;
        while (!now.done) {
            for (int p = warp; p < now.tokens; p += warps) {
                const int i = all.active[p];
                find_edge(all, cosines + (row + i) * num_tokens, i, now.tokens);
            }
            meet();
            if (first) join_components(all, told, ranks);
            meet();
            now = *told;
        }
        for (int t = warp; t < now.edges; t += warps) {
            const long long rank = merge_rank(all.height, now.edges, t);
            if (threadIdx.x % 32 == 0) all.sorted[rank] = t;
        }
        meet();
        if (first) {
            int* state = in_shared ? ranks + 32 : all.nearest;  // no more needed
            write_rows(all, now.edges, num_tokens, state,
                       out + b * (num_tokens - 1) * 4);
            if (threadIdx.x == 0) rounds[b] = now.rounds;
        }
        meet();  // before the next sequence takes this one's place
    }
}
