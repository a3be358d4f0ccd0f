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
// a sequence: its first block plans a round, then each warp brings rows up to date, in
// rows of its own, and finds their nearest clusters.

constexpr int COMPLETE = 1, WARD = 2;         // 0: average
constexpr int UNTOUCHED = -1, ABSORBED = -2;  // else: the slot that this one absorbs

// A cluster, as every row asks for it.
struct __align__(16) Slot {
    acc_t inverse, spread;  // 1 / W, and E(A, A) / W^2
    int mate;               // the slot that it absorbs in this round
};

// A cluster, as the plan of a round asks for it.
struct __align__(16) Record {
    acc_t sum;         // E with the nearest
    acc_t tallest;     // the height of its last merge
    acc_t weight;      // W
    int nearest;       // the slot of the nearest
    int node, tokens;  // its number in the dendrogram; how many it has
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

// The state of a sequence between rounds, in the order it lies in.
struct Clusters {
    Slot* slot;      // (N,)
    Record* record;  // (N,)
    acc_t* height;   // (N,) of merge t, before the root; first 1 / |x| of token t
    acc_t* unit;     // (1,) the mass that counts as 1
    Merge* merge;    // (N,)
    int* active;     // (N,) the slots there are
    int* joined;     // (N,) and those that are new

    __device__ Clusters(acc_t* reals, int* integers, long long n)
        : slot(reinterpret_cast<Slot*>(reals)),
          record(reinterpret_cast<Record*>(reals + 4 * n)),
          height(reals + 12 * n),
          unit(reals + 13 * n),
          merge(reinterpret_cast<Merge*>(integers)),
          active(integers + 3 * n),
          joined(integers + 4 * n) {}

    __device__ acc_t nearest_distance(int i, int method) const {
        return distance(record[i].sum, slot[i], slot[record[i].nearest], method);
    }
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

// What the first block of a sequence tells the others.
struct Plan {
    int clusters, joined;  // how many there are, and are new
    int made, wanted;      // merges
    int rounds, done;
};

// Set up the clusters, of one token each.
__device__ void begin(Clusters& all, Plan* plan, const acc_t* cosines,
                      const acc_t* mass, const bool* mask, const bool* protect,
                      long long num_tokens, long long num_groups, acc_t* scratch) {
    auto* ranks = reinterpret_cast<int*>(scratch + 32);
    acc_t top = 0;
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i])) top = max(top, mass[i]);
    top = block_reduce(top, scratch, Greatest());
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        // So that a token of no mass still joins its nearest.
        const acc_t weight = top > 0 ? max(mass[i] / top, acc_t(1e-6)) : acc_t(1);
        all.slot[i] = {1 / weight, 0, UNTOUCHED};
        all.record[i] = {0, 0, weight, -1, static_cast<int>(i), 1};
        all.height[i] = inverse_length(cosines[i * num_tokens + i]);
    }
    int tokens;
    const int clusters =
        list_tokens(mask, protect, num_tokens, ranks, all.active, &tokens);
    if (threadIdx.x > 0) return;
    *all.unit = top > 0 ? top : acc_t(1);
    const long long wanted = min(tokens - num_groups, clusters - 1ll);
    *plan = {clusters, 0, 0, static_cast<int>(wanted), 0, wanted <= 0};
}

// Merge all pairs that are each other's nearest, until the lowest `wanted` merges are
// made: those that come are no lower than the closest pair there is now.
__device__ void plan_round(Clusters& all, Plan* plan, long long num_tokens, int method,
                           acc_t* scratch) {
    auto* ranks = reinterpret_cast<int*>(scratch + 32);
    const int clusters = plan->clusters, made = plan->made, wanted = plan->wanted;
    if (made >= wanted) {
        acc_t least = -NEVER, lower = 0;
        for (int p = threadIdx.x; p < clusters; p += blockDim.x) {
            const int i = all.active[p];
            if (all.record[i].nearest >= 0)
                least = min(least, all.nearest_distance(i, method));
        }
        least = block_reduce(least, scratch, Least());
        for (int t = threadIdx.x; t < made; t += blockDim.x)
            lower += compared(all.height[t]) <= compared(least);
        lower = block_reduce(lower, scratch, Add());
        if (lower >= wanted) {
            if (threadIdx.x == 0) plan->done = 1;
            return;
        }
    }
    for (int p = threadIdx.x; p < clusters; p += blockDim.x) {
        const int i = all.active[p], j = all.record[i].nearest;
        const bool pair = j >= 0 && all.record[j].nearest == i;
        all.slot[i].mate = !pair ? UNTOUCHED : i < j ? j : ABSORBED;
    }
    __syncthreads();
    int kept = 0, joined = 0;
    for (int p0 = 0; p0 < clusters; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x;
        const int i = p < clusters ? all.active[p] : -1;
        const int j = i < 0 ? ABSORBED : all.slot[i].mate;
        int found;
        const int place = kept + block_rank(j != ABSORBED, ranks, &found);
        kept += found;
        const int t = joined + block_rank(j >= 0, ranks, &found);
        joined += found;
        if (j == ABSORBED) continue;
        all.active[place] = i;  // no further back than it was read
        if (j < 0) continue;
        Slot &a = all.slot[i], &b = all.slot[j];
        Record &own = all.record[i], &other = all.record[j];
        const acc_t weight = own.weight + other.weight;
        const acc_t within =
            a.spread * own.weight * own.weight + b.spread * other.weight * other.weight;
        const acc_t height = all.nearest_distance(i, method);
        own.tallest = max(height, max(own.tallest, other.tallest));  // than its parts
        all.height[made + t] = own.tallest;
        a.spread = (within + 2 * own.sum) / (weight * weight);
        a.inverse = 1 / weight;
        own.weight = weight;
        own.tokens += other.tokens;
        all.merge[made + t] = {own.node, other.node, own.tokens};
        own.node = static_cast<int>(num_tokens) + made + t;
        all.joined[t] = i;
    }
    if (threadIdx.x == 0)
        *plan = {kept, joined, made + joined, wanted, plan->rounds + 1, joined == 0};
}

// One warp: the nearest of all lanes' is that of row i.
__device__ __forceinline__ void keep_nearest(Clusters& all, int i, Neighbour best) {
    best = warp_nearest(i, best);
    __syncwarp();  // every lane has read the record
    if (threadIdx.x % 32 == 0)
        all.record[i].nearest = best.slot, all.record[i].sum = best.sum;
}

constexpr int AHEAD = 4;  // loads in flight

// One warp: E of row i with all clusters, from cosines; its nearest one.
__device__ void first_row(Clusters& all, const acc_t* cosines, acc_t* row, int i,
                          int clusters, int method) {
    const Slot own = all.slot[i];
    const acc_t scale = all.height[i], weight = all.record[i].weight;
    Neighbour best = {0, 0, -1};
    for (int p0 = threadIdx.x % 32; p0 < clusters; p0 += 32 * AHEAD) {
        int column[AHEAD];
        acc_t e[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            column[k] = p0 + 32 * k < clusters ? all.active[p0 + 32 * k] : i;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            e[k] = cosine_distance(cosines[j] * (scale * all.height[j])) *
                   (weight * all.record[j].weight);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            if (j == i) continue;
            row[j] = e[k];
            const Neighbour found = candidate(e[k], own, j, all.slot[j], method);
            if (nearer(i, found, best)) best = found;
        }
    }
    keep_nearest(all, i, best);
}

// One warp: bring row i up to date with this round's merges, and its nearest cluster.
// Columns are looked at only where something has changed, or all of them where the
// nearest cluster is no more what it was.
__device__ void next_row(Clusters& all, acc_t* matrix, int i, int clusters, int joined,
                         long long num_tokens, int method) {
    acc_t* row = matrix + i * num_tokens;
    const Slot own = all.slot[i];
    const int before = all.record[i].nearest;
    const acc_t* absorbed = own.mate < 0 ? nullptr : matrix + own.mate * num_tokens;
    const bool anew = absorbed || before < 0 || all.slot[before].mate != UNTOUCHED;
    const int* columns = anew ? all.active : all.joined;
    const int count = anew ? clusters : joined;
    Neighbour best = {0, 0, -1};
    if (!anew)
        best = candidate(all.record[i].sum, own, before, all.slot[before], method);

    for (int p0 = threadIdx.x % 32; p0 < count; p0 += 32 * AHEAD) {
        // All loads come before the first store, which they could not pass.
        int column[AHEAD];
        Slot other[AHEAD];
        acc_t e[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            column[k] = p0 + 32 * k < count ? columns[p0 + 32 * k] : i;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            other[k] = all.slot[column[k]];
            e[k] = row[column[k]];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k], mate = j == i ? UNTOUCHED : other[k].mate;
            // In this order, so that row j finds the same: the sums commute.
            if (absorbed && mate >= 0)
                e[k] = join(join(e[k], absorbed[mate], method),
                            join(row[mate], absorbed[j], method), method);
            else if (absorbed)
                e[k] = join(e[k], absorbed[j], method);
            else if (mate >= 0)
                e[k] = join(e[k], row[mate], method);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int j = column[k];
            if (j == i) continue;
            if (absorbed || other[k].mate >= 0) row[j] = e[k];
            const Neighbour found = candidate(e[k], own, j, other[k], method);
            if (nearer(i, found, best)) best = found;
        }
    }
    keep_nearest(all, i, best);
}

// One warp, one row of the dendrogram: merges by height, their nodes named by it.
__device__ void write_rows(const Clusters& all, int made, long long num_tokens,
                           int method, int warp, int warps, double* out) {
    const double unit = *all.unit;
    for (long long t = warp; t < num_tokens - 1; t += warps) {
        if (t >= made) {
            if (threadIdx.x % 32 == 0) store_no_row(out, t);
            continue;
        }
        long long node[2] = {all.merge[t].left, all.merge[t].right};
        for (int side = 0; side < 2; ++side)
            if (node[side] >= num_tokens)
                node[side] =
                    num_tokens + merge_rank(all.height, made, node[side] - num_tokens);
        const long long row = merge_rank(all.height, made, t);
        const double height = all.height[t];
        if (threadIdx.x % 32 == 0)
            store_row(out, row, node[0], node[1],
                      method == WARD ? sqrt(height * unit) : height,
                      all.merge[t].tokens);
    }
}

// matrix (B, N, N): cosines, used up unless there is shared memory for a matrix (N, N).
// `blocks` work at a sequence; of the sequences at work at once, `reals` and `integers`
// hold the clusters, `plans` the plans and `arrived` zeros. rounds (B,).
extern "C" __global__ void __launch_bounds__(LINKAGE_THREADS, 1)
    linkage(acc_t* matrix, const acc_t* mass, const bool* mask, const bool* protect,
            const int* counts, long long batch, long long num_tokens,
            long long num_groups, long long method, long long in_shared,
            long long blocks, acc_t* reals, int* integers, int* plans,
            unsigned* arrived, double* out, int* rounds) {
    auto* scratch = reinterpret_cast<acc_t*>(dynamic_shared());  // 64, then the matrix
    const int share = static_cast<int>(blocks);
    const int place = blockIdx.x / share, places = gridDim.x / share;
    const bool first = blockIdx.x % share == 0;
    const int warps = share * (blockDim.x / 32);
    const int warp = blockIdx.x % share * (blockDim.x / 32) + threadIdx.x / 32;
    if (place >= places) return;  // of a group that is not whole
    Clusters all(reals + place * (13 * num_tokens / 4 * 4 + 4),
                 integers + place * 5 * num_tokens, num_tokens);
    Plan* told = reinterpret_cast<Plan*>(plans) + place;
    const auto meet = [&] {
        if (share > 1)
            blocks_barrier(arrived + place, share);
        else
            __syncthreads();
    };
    for (long long b = place; b < batch; b += places) {
        const long long row = b * num_tokens;  // of (B, N)
        acc_t* cosines = matrix + row * num_tokens;
        acc_t* sums = in_shared ? scratch + 64 : cosines;
        if (first)
            begin(all, told, cosines, mass ? mass + row : nullptr,
                  mask ? mask + row : nullptr, protect ? protect + row : nullptr,
                  num_tokens, count_of(counts, b, num_groups), scratch);
        meet();
        Plan plan = *told;
        for (int p = warp; p < plan.clusters && !plan.done; p += warps) {
            const int i = all.active[p];
            first_row(all, cosines + i * num_tokens, sums + i * num_tokens, i,
                      plan.clusters, method);
        }
        while (!plan.done) {
            meet();
            if (first) plan_round(all, told, num_tokens, method, scratch);
            meet();
            plan = *told;
            for (int p = warp; p < plan.clusters && !plan.done; p += warps)
                next_row(all, sums, all.active[p], plan.clusters, plan.joined,
                         num_tokens, method);
        }
        write_rows(all, plan.made, num_tokens, method, warp, warps,
                   out + b * (num_tokens - 1) * 4);
        if (first && threadIdx.x == 0) rounds[b] = plan.rounds;
        meet();  // before the next sequence takes this one's place
    }
}
