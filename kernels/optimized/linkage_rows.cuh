// Rows of linkage.cu: update them after merges, and search them for nearest clusters.

// Publish in `next` the nearest of the clusters that the `lanes` at row i have seen.
// Row -1 means that these lanes have no row.
__device__ __forceinline__ void keep_nearest(const Clusters& all, NearestCluster* next,
                                             int i, Neighbour best, int lanes = 32) {
    best = warp_nearest(all.token(), i, best, lanes);
    if (i >= 0 && threadIdx.x % lanes == 0) next[i] = {best.sum, best.slot};
}

// One warp: compute E of row i with all clusters from the cosines, and publish its
// nearest cluster in `next`. Not inlined, as `init_clusters`.
__device__ __noinline__ void first_row(const Clusters& all, const acc_t* cosines,
                                       acc_t* row, int i, int clusters, int method,
                                       NearestCluster* next) {
    const Side own = all.side(i, method);
    const acc_t weight = all.weight()[i].weight, scale = all.scale()[i];
    Neighbour best = no_neighbour();
    if (row != cosines && threadIdx.x % 32 == 0) row[i] = 0;  // later loaded, not used
    for (int p0 = threadIdx.x % 32; p0 < clusters; p0 += 32 * ROW_LOADS) {
        int column[ROW_LOADS];
        acc_t e[ROW_LOADS];
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k)
            column[k] = p0 + 32 * k < clusters ? all.active()[p0 + 32 * k] : i;
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k) {
            const int j = column[k];
            e[k] = cosine_distance(cosines[j] * (scale * all.scale()[j])) *
                   (weight * all.weight()[j].weight);
        }
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k) {
            const int j = column[k];
            if (j == i) continue;
            row[j] = e[k];
            const Neighbour pair = candidate(e[k], own, j, all.side(j, method), method);
            if (nearer(all.token(), i, pair, best)) best = pair;
        }
    }
    keep_nearest(all, next, i, best);
}

// Update row i with this round's merges, in every `step`-th of `columns` from `start`,
// and return the nearest among these clusters and `best`. JOINED: cluster i is new.
// With cluster i = A u B and column j = C u D, the new value is
//   E(A u B, C u D) = (E(A, C) + E(B, D)) + (E(A, D) + E(B, C))
//                      e         corner      right     below
// and the terms of a part that did not merge are left out.
template <bool JOINED>
__device__ __forceinline__ Neighbour next_row(const Clusters& all, const Matrix& matrix,
                                              int i, const int* columns, int count,
                                              int start, int step, int method,
                                              Neighbour best) {
    acc_t* row = matrix.row(all, i);
    const Slot slot = all.slot()[i];
    const Side own = all.side(i, slot, method);
    const acc_t* absorbed = JOINED ? matrix.row(all, slot.mate) : nullptr;
    constexpr int LOADS =
        JOINED ? ROW_LOADS / 2 : ROW_LOADS;  // a new cluster loads two rows
    for (int p0 = start; p0 < count; p0 += step * LOADS) {
        // All loads come before the first use, so that a warp waits once for all of
        // them. They also come before the first store, because the compiler cannot move
        // a load above an earlier store.
        int column[LOADS];
        Slot other[LOADS];
        acc_t e[LOADS], right[LOADS], below[LOADS], corner[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int p = p0 + step * k;
            column[k] = p < count ? columns[p] : i;
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            other[k] = all.slot()[j];
            const int mate = other[k].mate;
            const bool two = mate >= 0 && j != i;
            e[k] = row[j];
            right[k] = two ? row[mate] : acc_t(0);
            below[k] = JOINED ? absorbed[j] : acc_t(0);
            corner[k] = JOINED && two ? absorbed[mate] : acc_t(0);
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            if (j == i) continue;
            // Row j adds the same four terms with `right` and `below` exchanged. Only
            // sums of two change order, so both rows get the same bits.
            const bool two = other[k].mate >= 0;
            acc_t sum = e[k];
            if (JOINED && two)
                sum = join(join(sum, corner[k], method),
                           join(right[k], below[k], method), method);
            else if (JOINED)
                sum = join(sum, below[k], method);
            else if (two)
                sum = join(sum, right[k], method);
            if (JOINED || two) row[j] = sum;
            const Neighbour pair =
                candidate(sum, own, j, all.side(j, other[k], method), method);
            if (nearer(all.token(), i, pair, best)) best = pair;
        }
    }
    return best;
}

// One warp: update row i and search it for the nearest cluster, in one of `parts` equal
// parts of all columns.
__device__ __forceinline__ Neighbour search_row(const Clusters& all,
                                                const Matrix& matrix, int i,
                                                int clusters, int part, int parts,
                                                int method) {
    const int start = part * 32 + threadIdx.x % 32, step = parts * 32;
    const Neighbour none = no_neighbour();
    if (all.slot()[i].mate >= 0)
        return next_row<true>(all, matrix, i, all.active(), clusters, start, step,
                              method, none);
    return next_row<false>(all, matrix, i, all.active(), clusters, start, step, method,
                           none);
}

// Update the rows that keep their nearest cluster. Only distances to new clusters have
// changed, so such a row compares its nearest cluster with the new ones. A row gets as
// many lanes as the number of new clusters can use; a warp works on several rows.
__device__ __forceinline__ void next_columns(const Clusters& all, const Matrix& matrix,
                                             const Progress& now, int warp, int warps,
                                             NearestCluster* next, int method) {
    const int lane = threadIdx.x % 32;
    int lanes = 1;
    while (lanes < 32 && lanes * ROW_LOADS < now.joined) lanes *= 2;
    const int rows = 32 / lanes;
    for (int q0 = now.searched + warp * rows; q0 < now.clusters; q0 += warps * rows) {
        const int q = q0 + lane / lanes, i = q < now.clusters ? all.rows()[q] : -1;
        Neighbour best = no_neighbour();
        if (i >= 0 &&
            lane % lanes == 0) {  // one lane only, or it would tie with itself
            const int before = all.nearest()[i];
            best = candidate(all.sum()[i], all.side(i, method), before,
                             all.side(before, method), method);
        }
        if (i >= 0) {
            best = next_row<false>(all, matrix, i, all.joined(), now.joined,
                                   lane % lanes, lanes, method, best);
        }
        keep_nearest(all, next, i, best, lanes);
    }
}

// Update every row and publish its nearest cluster in `next`. Block `block` of `blocks`
// takes its own part of the rows.
__device__ void next_rows(const Clusters& all, const Matrix& matrix,
                          const Progress& now, int block, int blocks,
                          NearestCluster* next, int method, Neighbour* scratch) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32, warps = blockDim.x / 32;
    // Rows that need a search come first, because they take longest. If a block has
    // fewer of them than warps, several warps divide the columns of one row.
    const int rows_per_block = (now.searched + blocks - 1) / blocks;
    const int parts =
        max(min(warps / max(rows_per_block, 1), (now.clusters + PART - 1) / PART), 1);
    const int at_once = warps / parts, part = own % parts;
    Neighbour best = no_neighbour();
    int i = -1;
    for (int q = own / parts; q < rows_per_block && own / parts < at_once;
         q += at_once) {
        const int position = q * blocks + block;
        if (position >= now.searched) break;
        i = all.rows()[position];
        best = search_row(all, matrix, i, now.clusters, part, parts, method);
        best = warp_nearest(all.token(), i, best);
        if (lane == 0 && parts == 1) next[i] = {best.sum, best.slot};
    }
    if (parts > 1 && lane == 0) scratch[own] = best;
    // The other rows go to the last warps first: these had no row to search, or the
    // shortest part.
    next_columns(all, matrix, now, (warps - 1 - own) * blocks + block, blocks * warps,
                 next, method);
    if (parts == 1) return;
    __syncthreads();
    if (i >= 0 && part == 0)
        keep_nearest(all, next, i, lane < parts ? scratch[own + lane] : no_neighbour());
}
