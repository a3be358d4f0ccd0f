// Compaction of linkage.cu: when many slots are empty, the columns in use move
// together.

// Move the columns in use to the left, in every row in use. One warp moves one row. The
// lists still have the old slots afterwards: `renumber` must follow.
__device__ void move_columns(const Clusters& all, const Matrix& matrix, int clusters,
                             int warp, int warps) {
    for (int q = warp; q < clusters; q += warps) {
        acc_t* row = matrix.row(all, all.active()[q]);
        for (int p0 = threadIdx.x % 32; p0 - threadIdx.x % 32 < clusters;
             p0 += 32 * ROW_LOADS) {
            acc_t e[ROW_LOADS];
#pragma unroll
            for (int k = 0; k < ROW_LOADS; ++k)
                if (p0 + 32 * k < clusters) e[k] = row[all.active()[p0 + 32 * k]];
            __syncwarp();  // no column moves right, so later ones stay intact
#pragma unroll
            for (int k = 0; k < ROW_LOADS; ++k)
                if (p0 + 32 * k < clusters) row[p0 + 32 * k] = e[k];
        }
    }
}

// One block: renumber the slots in use as 0 .. clusters - 1, in their order, and write
// them to `state`, which has room for `num_slots`. With another `num_slots` the new
// arrays have other offsets and may overlap the old ones. Then each thread may have at
// most one slot, so that one pass reads all slots before it writes the first.
__device__ void renumber(const Clusters& all, int clusters, unsigned char* state,
                         int num_slots) {
    int* new_slot = all.rows();  // indexed by the old slot
    for (int p = threadIdx.x; p < clusters; p += blockDim.x)
        new_slot[all.active()[p]] = p;
    __syncthreads();
    Clusters moved = {all.heights, state, num_slots, 1 - all.turn};
    for (int p0 = 0; p0 < clusters; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x, i = all.active()[min(p, clusters - 1)];
        const Slot slot = all.slot()[i];
        const Weight weight = all.weight()[i];
        const acc_t sum = all.sum()[i];
        const int nearest = all.nearest()[i], token = all.token()[i];
        const int near = nearest < 0 ? nearest : new_slot[nearest];
        __syncthreads();  // all have read; no slot moves to a higher index
        if (p < clusters) {
            moved.slot()[p] = slot;
            moved.weight()[p] = weight;
            moved.sum()[p] = sum;
            moved.nearest()[p] = near;
            moved.token()[p] = token;
            moved.active()[p] = p;
        }
    }
    __syncthreads();
}

// One block: copy a matrix to shared memory, after its columns have moved together. Not
// inlined, as `init_clusters`.
__device__ __noinline__ void copy_matrix(const Clusters& all, const Matrix& matrix,
                                         const Matrix& resident) {
    for (int i = threadIdx.x / 32; i < all.num_slots; i += blockDim.x / 32) {
        const acc_t* row = matrix.row(all, i);
        for (int j = threadIdx.x % 32; j < all.num_slots; j += 32)
            resident.row(all, i)[j] = row[j];
    }
    __syncthreads();
}
