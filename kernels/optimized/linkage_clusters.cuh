// The clusters of linkage.cu, their distances, and the merges that become a dendrogram.

// Values of `Slot::mate` other than a slot.
constexpr int UNTOUCHED = -1, ABSORBED = -2;
// Columns of a row, and published nearest clusters, that a thread loads before it uses
// the first of them.
constexpr int ROW_LOADS = 4, EXCHANGE_LOADS = 8;
constexpr int PART = 64;  // columns of a row that justify one more warp for it

// Round a number of bytes up to whole vectors.
template <class Size>
__device__ __forceinline__ Size aligned_bytes(Size size) {
    return (size + (VECTOR_BYTES - 1)) / VECTOR_BYTES * VECTOR_BYTES;
}

// The values of a cluster that every row reads.
struct __align__(2 * sizeof(acc_t)) Slot {
    acc_t inverse;  // 1 / W
    int mate;       // the slot that it absorbs in this round, UNTOUCHED or ABSORBED
};

struct __align__(2 * sizeof(acc_t)) Weight {
    acc_t weight, spread;  // W, and E(A, A) / W^2
};

// The values of a cluster that a distance needs: 1 / W and E(A, A) / W^2.
struct Side {
    acc_t inverse, spread;
};

// `Clusters` has five and a half integers for each slot in addition to the structs: the
// nearest slot, and lists 0 to 3 and half of list 4.
static_assert(SLOT_BYTES ==
              sizeof(Slot) + sizeof(Weight) + sizeof(acc_t) + 11 * sizeof(int) / 2);

// The nearest cluster of a slot, and E with it, as blocks publish it to each other.
struct NearestCluster {
    acc_t sum;
    int slot;
};
static_assert(sizeof(NearestCluster) == NEAREST_BYTES);

struct Merge {
    int left, right, tokens;  // the nodes it joins
};

// The distance of two clusters, given E of them. Ward's is squared:
//   2 W_A W_C / (W_A + W_C) = 2 / (1 / W_A + 1 / W_C)
__device__ __forceinline__ acc_t distance(acc_t e, const Side& a, const Side& b,
                                          int method) {
    if (method == COMPLETE) return e;
    const acc_t mean = e * (a.inverse * b.inverse);
    if (method != WARD) return mean;
    const acc_t gap = 2 * mean - (a.spread + b.spread);
    return (gap < 0 ? acc_t(0) : gap) * 2 / (a.inverse + b.inverse);  // keeps a NaN
}

// The clusters of a sequence, of which each block has a copy. The arrays lie in `state`
// in the order of these functions. Their addresses are computed at each use, because
// pointers to all of them would take too many registers.
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
    // E with the nearest cluster; right after a merge, the distance of that merge.
    __device__ acc_t* sum() const {
        return reinterpret_cast<acc_t*>(weight() + num_slots);
    }
    __device__ int* nearest() const {
        return reinterpret_cast<int*>(sum() + num_slots);
    }
    // The first token of the cluster. Its row of the matrix is the cluster's row.
    __device__ int* token() const { return list(0); }
    // The slots in use, and the list of the slots that this round leaves in use.
    __device__ int* active() const { return list(1 + turn); }
    __device__ int* next() const { return list(2 - turn); }
    // The slots of `next`, sorted: first those that need a search, then the others.
    __device__ int* rows() const { return list(3); }
    __device__ int* joined() const {
        return list(4);
    }  // the new clusters, at most half of the slots

    // 1 / |x| of each token. It uses the memory of the heights before the first merge.
    __device__ acc_t* scale() const { return heights; }

    __device__ int* list(int k) const { return nearest() + (1 + k) * num_slots; }
};

// E of all pairs of clusters. A cluster has the row of its first token, or, if `dense`,
// the row of its slot.
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
    int number;    // below N: a token; N + t: merge t
    int tokens;
};

static_assert(TREE_BYTES == sizeof(Node) + sizeof(acc_t) + sizeof(Merge));

// The merges of a sequence in the order they were made, which the first block writes.
// They become the dendrogram when they are sorted by height.
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
    // (N,) the row of merge t, and the number of merges. They use the memory of the
    // nodes after the last round, when no node is needed.
    __device__ int* rank() const { return reinterpret_cast<int*>(data); }
    __device__ int* made() const { return rank() + num_tokens; }
};

// The progress of a sequence, the same in all threads of the blocks that work on it.
struct Progress {
    int clusters, joined, searched;  // counts: all, new ones, rows that need a search
    int made;                        // merges
    int rounds;
    int slots;  // in use and empty ones
    bool done;
};

// Two constants of a sequence, in shared memory to save registers: the mass that counts
// as 1, and the number of merges wanted.
struct Goal {
    acc_t unit;
    int wanted;
};
__device__ __forceinline__ Goal*
goal() {  // behind the part of the scratch that reductions use
    static_assert(sizeof(Goal) <= 4 * sizeof(acc_t));
    return reinterpret_cast<Goal*>(reinterpret_cast<acc_t*>(dynamic_shared()) +
                                   LINKAGE_SCRATCH - 4);
}

// Round a distance to a multiple of 8 units in the last place. Distances are compared
// in this form: their last bits depend on rounding alone, and would decide between
// equal distances by chance.
__device__ __forceinline__ float compared(float x) {
    return __uint_as_float((__float_as_uint(x) + 4) & ~7u);
}
__device__ __forceinline__ double compared(double x) {
    return __longlong_as_double((__double_as_longlong(x) + 4) & ~7ll);
}

__device__ __forceinline__ Neighbour candidate(acc_t e, const Side& own, int j,
                                               const Side& other, int method) {
    const acc_t exact = distance(e, own, other, method);
    // A NaN counts as infinitely far: `compared` could wrap its bits to a distance.
    return {exact >= 0 ? compared(exact) : -padding(), e, j};
}

// E(A u B, C) from E(A, C) and E(B, C).
__device__ __forceinline__ acc_t join(acc_t x, acc_t y, int method) {
    return method == COMPLETE ? max(x, y) : x + y;
}
