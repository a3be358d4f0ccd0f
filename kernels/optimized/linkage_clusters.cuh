// The clusters of linkage.cu, their distances, and what becomes a dendrogram.

constexpr int UNTOUCHED = -1, ABSORBED = -2;  // else: the slot that this one absorbs
constexpr int AHEAD = 4, READ = 8;  // loads in flight: of rows, of what was found
constexpr int PART = 64;            // columns that are worth another warp

// Bytes of shared memory, in whole vectors.
template <class Size>
__device__ __forceinline__ Size aligned_bytes(Size size) {
    return (size + (VECTOR_BYTES - 1)) / VECTOR_BYTES * VECTOR_BYTES;
}

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

// In `Clusters`, whose lists have five and a half integers of a slot.
static_assert(SLOT_BYTES ==
              sizeof(Slot) + sizeof(Weight) + sizeof(acc_t) + 11 * sizeof(int) / 2);

// The nearest cluster of a slot, and E with it.
struct Found {
    acc_t sum;
    int slot;
};
static_assert(sizeof(Found) == NEAREST_BYTES);

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

static_assert(TREE_BYTES == sizeof(Node) + sizeof(acc_t) + sizeof(Merge));

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
    static_assert(sizeof(Goal) <= 4 * sizeof(acc_t));
    return reinterpret_cast<Goal*>(reinterpret_cast<acc_t*>(dynamic_shared()) +
                                   LINKAGE_SCRATCH - 4);
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
