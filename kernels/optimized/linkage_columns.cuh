// Compaction for linkage.cu: when many slots are empty, the columns in use are moved to
// the left, without gaps. Slots, `Clusters` and `Matrix` are in linkage_clusters.cuh;
// linkage.cu describes the team of blocks.

// Move the columns in use to the left, in every row in use. One warp of the team moves
// one row, so no barrier is needed. The lists still have the old slots afterwards:
// `renumber` must follow.
__device__ void move_columns(const Clusters& all, const Matrix& matrix,
                             int num_clusters, int team_warp, int team_warps) {
    for (int q = team_warp; q < num_clusters; q += team_warps) {
        acc_t* row = matrix.row(all, all.active()[q]);
        for (int p0 = threadIdx.x % 32; p0 - threadIdx.x % 32 < num_clusters;
             p0 += 32 * ROW_LOADS) {
            acc_t e[ROW_LOADS];
#pragma unroll
            for (int k = 0; k < ROW_LOADS; ++k)
                if (p0 + 32 * k < num_clusters) e[k] = row[all.active()[p0 + 32 * k]];
            __syncwarp();  // columns only move left, so no later one is lost
#pragma unroll
            for (int k = 0; k < ROW_LOADS; ++k)
                if (p0 + 32 * k < num_clusters) row[p0 + 32 * k] = e[k];
        }
    }
}

// One block: renumber the slots in use as 0 .. num_clusters - 1, in their order, and
// write them to `state`, which has room for `num_slots`. If `num_slots` is not that of
// `all`, the new arrays have other offsets and may overlap the old ones. Then the
// caller must ensure num_clusters <= blockDim.x, so that a single pass reads all slots
// before it writes the first one.
__device__ void renumber(const Clusters& all, int num_clusters, unsigned char* state,
                         int num_slots) {
    int* new_slot = all.search_order();  // indexed by the old slot
    for (int p = threadIdx.x; p < num_clusters; p += blockDim.x)
        new_slot[all.active()[p]] = p;
    __syncthreads();  // `new_slot` is complete
    Clusters moved = {all.heights, state, num_slots, 1 - all.active_list};
    for (int p0 = 0; p0 < num_clusters; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x, i = all.active()[min(p, num_clusters - 1)];
        const SlotValues slot = all.slots()[i];
        const Mass mass = all.masses()[i];
        const acc_t e = all.nearest_e()[i];
        const int nearest = all.nearest()[i], token = all.first_token()[i];
        const int new_nearest = nearest < 0 ? nearest : new_slot[nearest];
        __syncthreads();  // all threads have read; slots only move down
        if (p < num_clusters) {
            moved.slots()[p] = slot;
            moved.masses()[p] = mass;
            moved.nearest_e()[p] = e;
            moved.nearest()[p] = new_nearest;
            moved.first_token()[p] = token;
            moved.active()[p] = p;
        }
    }
    __syncthreads();
}

// One block: copy a matrix to shared memory, after its columns have been moved to the
// left. Row i of `shared_matrix` is the row of slot i. Not inlined, for the reason
// given at `init_clusters` (linkage.cu).
__device__ __noinline__ void copy_matrix(const Clusters& all, const Matrix& matrix,
                                         const Matrix& shared_matrix) {
    for (int i = threadIdx.x / 32; i < all.num_slots; i += blockDim.x / 32) {
        const acc_t* row = matrix.row(all, i);
        for (int j = threadIdx.x % 32; j < all.num_slots; j += 32)
            shared_matrix.row(all, i)[j] = row[j];
    }
    __syncthreads();
}
