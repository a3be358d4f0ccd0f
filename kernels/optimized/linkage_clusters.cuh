// The clusters of linkage.cu, their distances, and the merges that become a dendrogram.
// linkage.cu has the formulas of E, W and the distances. Each cluster has a slot: its
// index in the arrays of `Clusters`, which is also the index of its column in the
// matrix.

// `mate` is the slot that a cluster absorbs in a round, or one of these two values. It
// can be ABSORBED only in a `Change` (linkage.cu), not in `SlotValues`.
constexpr int UNTOUCHED = -1, ABSORBED = -2;
// Numbers of loads that a thread starts before it uses the first of them. ROW_LOADS is
// for the columns of a row. EXCHANGE_LOADS is for the nearest clusters that the blocks
// exchange (`NearestCluster`).
constexpr int ROW_LOADS = 4, EXCHANGE_LOADS = 8;
constexpr int PART = 64;  // a row gets at most one warp for each PART columns

// Round a number of bytes up to whole vectors of VECTOR_BYTES.
template <class Size>
__device__ __forceinline__ Size aligned_bytes(Size size) {
    return (size + (VECTOR_BYTES - 1)) / VECTOR_BYTES * VECTOR_BYTES;
}

// The values of a cluster that all other clusters read in every round.
struct __align__(2 * sizeof(acc_t)) SlotValues {
    acc_t inverse_mass;  // 1 / W
    int mate;            // slot absorbed in this round, or UNTOUCHED
};

struct __align__(2 * sizeof(acc_t)) Mass {
    acc_t mass, spread;  // W; E(A, A) / W^2
};

// One side of a distance: the values of one cluster that the distance depends on.
// `spread` is E(A, A) / W^2. Only ward reads it.
struct Side {
    acc_t inverse_mass, spread;
};

// The bytes per slot in `Clusters`: a `SlotValues`, a `Mass`, the E of the nearest
// cluster, and five and a half integers. These are the nearest slot, one entry in each
// of the lists 0 to 3 (`Clusters::list`), and half an entry in list 4, because this
// list has half the length.
static_assert(SLOT_BYTES ==
              sizeof(SlotValues) + sizeof(Mass) + sizeof(acc_t) + 11 * sizeof(int) / 2);

// The nearest cluster of the cluster in a slot, and E of these two clusters. In every
// round each block publishes them for its own rows, and all blocks read them for all
// rows.
struct NearestCluster {
    acc_t e;
    int slot;
};
static_assert(sizeof(NearestCluster) == NEAREST_BYTES);

struct Merge {
    int left, right, tokens;  // two nodes; tokens of both
};

// The distance of two clusters A and B, from E(A, B). Ward's is squared: it is
// |mu_A - mu_B|^2 (`squared_gap`) times the factor
//   2 W_A W_B / (W_A + W_B) = 2 / (1 / W_A + 1 / W_B)
__device__ __forceinline__ acc_t distance(acc_t e, const Side& a, const Side& b,
                                          int method) {
    if (method == COMPLETE) return e;
    const acc_t mean = e * (a.inverse_mass * b.inverse_mass);
    if (method != WARD) return mean;
    const acc_t squared_gap = 2 * mean - (a.spread + b.spread);
    return (squared_gap < 0 ? acc_t(0) : squared_gap) * 2 /
           (a.inverse_mass + b.inverse_mass);  // NaN stays NaN
}

// The clusters of a sequence. Each block has its own copy. The arrays lie in `state` in
// the order of the functions below, with one entry for each slot. Their addresses are
// computed at each use, because pointers to all of them would take too many registers.
struct Clusters {
    acc_t* heights;  // (N,), of the merges so far: a copy of `Tree::height`
    unsigned char* state;
    int num_slots;
    int active_list;  // 0: `active` is list 1; 1: it is list 2

    __device__ SlotValues* slots() const {
        return reinterpret_cast<SlotValues*>(state);
    }
    __device__ Mass* masses() const {
        return reinterpret_cast<Mass*>(slots() + num_slots);
    }
    __device__ Side side(int i, const SlotValues& slot, int method) const {
        return {slot.inverse_mass, method == WARD ? masses()[i].spread : acc_t(0)};
    }
    __device__ Side side(int i, int method) const {
        return side(i, slots()[i], method);
    }
    // E of each cluster and its nearest cluster. After a merge, the entry of the new
    // cluster is the distance of the two merged clusters. linkage.cu computes the
    // height of the merge from it. The next round writes an E again.
    __device__ acc_t* nearest_e() const {
        return reinterpret_cast<acc_t*>(masses() + num_slots);
    }
    __device__ int* nearest() const {
        return reinterpret_cast<int*>(nearest_e() + num_slots);
    }
    // The first token of the cluster in each slot. The cluster's row of the matrix is
    // that of this token.
    __device__ int* first_token() const { return list(0); }
    // The slots in use, and the slots that are still in use after this round.
    __device__ int* active() const { return list(1 + active_list); }
    __device__ int* next_active() const { return list(2 - active_list); }
    // The slots of `next_active`: first the clusters whose rows need a search, then the
    // other clusters.
    __device__ int* search_order() const { return list(3); }
    // The slots of the new clusters, which are at most half of the slots.
    __device__ int* new_clusters() const { return list(4); }

    // 1 / |x| of each token (N,). Before the first merge, this array uses the memory of
    // the heights.
    __device__ acc_t* inverse_norms() const { return heights; }

    __device__ int* list(int k) const { return nearest() + (1 + k) * num_slots; }
};

// E of all pairs of clusters. A cluster has the row of its first token. If
// `moved_to_shared`, the first block works alone, the matrix is in its shared memory,
// and a cluster has the row of its slot.
struct Matrix {
    acc_t* data;
    long long width;
    bool moved_to_shared;

    __device__ __forceinline__ acc_t* row(const Clusters& all, int i) const {
        return data + (moved_to_shared ? i : all.first_token()[i]) * width;
    }
};

// The node of a cluster in the dendrogram.
struct Node {
    acc_t height;  // not less than the height of either part
    int index;     // i < N: token i; N + t: merge t
    int tokens;
};

static_assert(TREE_BYTES == sizeof(Node) + sizeof(acc_t) + sizeof(Merge));

// The merges of a sequence in the order they were made. They become the dendrogram when
// they are sorted by height. During the rounds the first block writes the arrays, and
// all blocks read the heights. After the rounds all blocks write the ranks.
struct Tree {
    unsigned char* data;
    int num_tokens;

    // (N,), by first token: the node of a cluster is at its first token.
    __device__ Node* node() const { return reinterpret_cast<Node*>(data); }
    __device__ acc_t* height() const {  // (N,); for ward before the square root
        return reinterpret_cast<acc_t*>(node() + num_tokens);
    }
    __device__ Merge* merge() const {  // (N,)
        return reinterpret_cast<Merge*>(height() + num_tokens);
    }
    // rank()[t] (N,) is the row of merge t in the dendrogram. The ranks and the number
    // of merges use the memory of the nodes after the last round, when no node is
    // needed.
    __device__ int* rank() const { return reinterpret_cast<int*>(data); }
    __device__ int* num_merges() const { return rank() + num_tokens; }
};

// The progress of a sequence. It has the same value in all threads of the blocks that
// work on the sequence.
struct Progress {
    int num_clusters, num_new, num_searched;  // clusters; new ones; rows to search
    int num_merges;                           // so far
    int rounds;
    int num_columns;  // of the matrix: in use and empty ones
    bool done;
};

// Two constants of a sequence, in shared memory to save registers: the largest mass,
// which is the unit of all others, and the number of merges that are wanted.
struct Constants {
    acc_t mass_unit;
    int wanted_merges;
};
// The constants are after the part of the scratch memory that reductions use.
__device__ __forceinline__ Constants* constants() {
    static_assert(sizeof(Constants) <= 4 * sizeof(acc_t));
    return reinterpret_cast<Constants*>(reinterpret_cast<acc_t*>(dynamic_shared()) +
                                        LINKAGE_SCRATCH - 4);
}

// Round a distance to a multiple of 8 units in the last place. Distances are compared
// in this form: their last bits depend on rounding alone, and could make equal
// distances different.
__device__ __forceinline__ float rounded_for_comparison(float x) {
    return __uint_as_float((__float_as_uint(x) + 4) & ~7u);
}
__device__ __forceinline__ double rounded_for_comparison(double x) {
    return __longlong_as_double((__double_as_longlong(x) + 4) & ~7ll);
}

// Return cluster j as a candidate for the nearest neighbour of cluster i, given E of
// both. `Neighbour` is in linkage.cuh.
__device__ __forceinline__ Neighbour candidate(acc_t e, const Side& side_i, int j,
                                               const Side& side_j, int method) {
    const acc_t exact = distance(e, side_i, side_j, method);
    // A NaN gets the distance +infinity, which is -padding(). It must not be rounded,
    // because `rounded_for_comparison` could turn its bits into those of a distance.
    return {exact >= 0 ? rounded_for_comparison(exact) : -padding(), e, j};
}

// E(A u B, C) from E(A, C) and E(B, C).
__device__ __forceinline__ acc_t e_of_union(acc_t e_ac, acc_t e_bc, int method) {
    return method == COMPLETE ? max(e_ac, e_bc) : e_ac + e_bc;
}
