// Columns of linkage.cu that move together, when many slots are empty.

// Move the columns in use to the left, in every row in use, a warp a row. Lists keep
// the old slots: `renumber` follows.
__device__ void move_columns(const Clusters& all, const Matrix& matrix, int clusters,
                             int warp, int warps) {
    for (int q = warp; q < clusters; q += warps) {
        acc_t* row = matrix.row(all, all.active()[q]);
        for (int p0 = threadIdx.x % 32; p0 - threadIdx.x % 32 < clusters;
             p0 += 32 * AHEAD) {
            acc_t e[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (p0 + 32 * k < clusters) e[k] = row[all.active()[p0 + 32 * k]];
            __syncwarp();  // no column moves to the right, so later ones are safe
#pragma unroll
            for (int k = 0; k < AHEAD; ++k)
                if (p0 + 32 * k < clusters) row[p0 + 32 * k] = e[k];
        }
    }
}

// One block: number the slots in use anew, 0 .. clusters - 1, in their order. `state`
// is where they go, with room for `num_slots`: other memory only if no thread has more
// than one.
__device__ void renumber(const Clusters& all, int clusters, unsigned char* state,
                         int num_slots) {
    int* place = all.rows();  // by old slot
    for (int p = threadIdx.x; p < clusters; p += blockDim.x) place[all.active()[p]] = p;
    __syncthreads();
    Clusters moved = {all.heights, state, num_slots, 1 - all.turn};
    for (int p0 = 0; p0 < clusters; p0 += blockDim.x) {
        const int p = p0 + threadIdx.x, i = all.active()[min(p, clusters - 1)];
        const Slot slot = all.slot()[i];
        const Weight weight = all.weight()[i];
        const acc_t sum = all.sum()[i];
        const int nearest = all.nearest()[i], token = all.token()[i];
        const int near = nearest < 0 ? nearest : place[nearest];
        __syncthreads();  // all have read, and no slot moves up
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

// One block: copy a matrix, whose columns have been moved, to shared memory. Called, as
// `begin`.
__device__ __noinline__ void hold(const Clusters& all, const Matrix& matrix,
                                  const Matrix& held) {
    for (int i = threadIdx.x / 32; i < all.num_slots; i += blockDim.x / 32) {
        const acc_t* row = matrix.row(all, i);
        for (int j = threadIdx.x % 32; j < all.num_slots; j += 32)
            held.row(all, i)[j] = row[j];
    }
    __syncthreads();
}
