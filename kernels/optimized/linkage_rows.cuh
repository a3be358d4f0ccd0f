// Rows of the matrix of linkage.cu: update them after merges, and search them for
// nearest clusters. Slots, `Clusters` and `Matrix` are in linkage_clusters.cuh,
// `Neighbour` in linkage.cuh. Row i is the row of the cluster in slot i, and column j
// is that of slot j. `publish_to` has an entry for each slot: a block writes the
// entries of its own rows, and every block reads all of them in the next round
// (`read_published` in linkage.cu). There are two such buffers in turn: one to read in
// this round, one to publish for the next. With one buffer, a fast block would
// overwrite entries that a slow block still reads. A block writes a buffer again only
// after the next round's barrier, which every block reaches after it has read that
// buffer.

// Publish in publish_to[i] the nearest of the clusters that the `lanes` lanes at row i
// have seen. i = -1 means that these lanes have no row.
__device__ __forceinline__ void publish_nearest(const Clusters& all,
                                                NearestCluster* publish_to, int i,
                                                Neighbour best, int lanes = 32) {
    best = warp_nearest(all.first_token(), i, best, lanes);
    if (i >= 0 && threadIdx.x % lanes == 0) publish_to[i] = {best.e, best.slot};
}

// One warp: compute E of row i with all clusters from the cosines of token i, and
// publish the nearest cluster of i. At this time every cluster is one token. Complete
// linkage takes no masses, so its masses are 1. Not inlined, for the reason given at
// `init_clusters` (linkage.cu).
__device__ __noinline__ void init_row(const Clusters& all, const acc_t* cosines,
                                      acc_t* row, int i, int num_clusters, int method,
                                      NearestCluster* publish_to) {
    const Side side_i = all.side(i, method);
    const acc_t mass_i = all.masses()[i].mass, inverse_norm_i = all.inverse_norms()[i];
    Neighbour best = no_neighbour();
    // If the matrix is in shared memory (row != cosines), no other statement sets the
    // diagonal. `update_row` loads this element, but does not use its value.
    if (row != cosines && threadIdx.x % 32 == 0) row[i] = 0;
    for (int p0 = threadIdx.x % 32; p0 < num_clusters; p0 += 32 * ROW_LOADS) {
        int column[ROW_LOADS];
        acc_t e[ROW_LOADS];
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k)  // i marks a missing column
            column[k] = p0 + 32 * k < num_clusters ? all.active()[p0 + 32 * k] : i;
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k) {
            const int j = column[k];
            e[k] = cosine_distance(cosines[j] *
                                   (inverse_norm_i * all.inverse_norms()[j])) *
                   (mass_i * all.masses()[j].mass);
        }
#pragma unroll
        for (int k = 0; k < ROW_LOADS; ++k) {
            const int j = column[k];
            if (j == i) continue;
            row[j] = e[k];
            const Neighbour pair =
                candidate(e[k], side_i, j, all.side(j, method), method);
            if (nearer(all.first_token(), i, pair, best)) best = pair;
        }
    }
    publish_nearest(all, publish_to, i, best);
}

// Update row i with this round's merges, in every `step`-th of `columns` from `start`,
// and return the nearest among these clusters and `best`. IS_NEW: cluster i is new.
// With cluster i = A u B in row A, and column j = C u D in column C, the new value is
//   E(A u B, C u D) = (E(A, C) + E(B, D)) + (E(A, D) + E(B, C))
//                      e         corner      right     below
// `e` and `right` are loaded from row A at columns C and D, `below` and `corner` from
// row B at columns C and D. If cluster i did not merge (B does not exist), `below` and
// `corner` are left out; if column j did not merge, `right` and `corner` are left out.
// For complete linkage, each + is a maximum.
template <bool IS_NEW>
__device__ __forceinline__ Neighbour update_row(const Clusters& all,
                                                const Matrix& matrix, int i,
                                                const int* columns, int count,
                                                int start, int step, int method,
                                                Neighbour best) {
    acc_t* row = matrix.row(all, i);
    const SlotValues slot = all.slots()[i];
    const Side side_i = all.side(i, slot, method);
    const acc_t* absorbed = IS_NEW ? matrix.row(all, slot.mate) : nullptr;
    // A new cluster loads two rows, so it loads half as many columns at once.
    constexpr int LOADS = IS_NEW ? ROW_LOADS / 2 : ROW_LOADS;
    for (int p0 = start; p0 < count; p0 += step * LOADS) {
        // All loads come before the first use, so that a warp waits once for all of
        // them. The loads also come before the first store, because the compiler cannot
        // move a load above an earlier store.
        int column[LOADS];
        SlotValues other[LOADS];
        acc_t e[LOADS], right[LOADS], below[LOADS], corner[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int p = p0 + step * k;
            column[k] = p < count ? columns[p] : i;  // i: missing
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            other[k] = all.slots()[j];
            const int mate = other[k].mate;
            const bool column_merged = mate >= 0 && j != i;
            e[k] = row[j];
            right[k] = column_merged ? row[mate] : acc_t(0);
            below[k] = IS_NEW ? absorbed[j] : acc_t(0);
            corner[k] = IS_NEW && column_merged ? absorbed[mate] : acc_t(0);
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const int j = column[k];
            if (j == i) continue;
            // Row j adds the same four terms with `right` and `below` exchanged. Only
            // the order of two terms of a sum changes, so both rows get the same bits.
            const bool column_merged = other[k].mate >= 0;
            acc_t sum = e[k];
            if (IS_NEW && column_merged)
                sum = e_of_union(e_of_union(sum, corner[k], method),
                                 e_of_union(right[k], below[k], method), method);
            else if (IS_NEW)
                sum = e_of_union(sum, below[k], method);
            else if (column_merged)
                sum = e_of_union(sum, right[k], method);
            if (IS_NEW || column_merged) row[j] = sum;
            const Neighbour pair =
                candidate(sum, side_i, j, all.side(j, other[k], method), method);
            if (nearer(all.first_token(), i, pair, best)) best = pair;
        }
    }
    return best;
}

// One warp: update row i and search it for the nearest cluster, in part `part` of
// `parts` equal parts of all columns.
__device__ __forceinline__ Neighbour search_row(const Clusters& all,
                                                const Matrix& matrix, int i,
                                                int num_clusters, int part, int parts,
                                                int method) {
    const int start = part * 32 + threadIdx.x % 32, step = parts * 32;
    const Neighbour none = no_neighbour();
    if (all.slots()[i].mate >= 0)
        return update_row<true>(all, matrix, i, all.active(), num_clusters, start, step,
                                method, none);
    return update_row<false>(all, matrix, i, all.active(), num_clusters, start, step,
                             method, none);
}

// Update the rows that need no search: their nearest cluster did not merge. Only
// distances to new clusters have changed, so such a row compares its nearest cluster
// with the new ones. A row gets as many lanes as the number of new clusters can use, so
// a warp may work on several rows.
__device__ __forceinline__ void update_new_columns(
    const Clusters& all, const Matrix& matrix, const Progress& now, int team_warp,
    int team_warps, NearestCluster* publish_to, int method) {
    const int lane = threadIdx.x % 32;
    int lanes = 1;
    while (lanes < 32 && lanes * ROW_LOADS < now.num_new) lanes *= 2;
    const int rows_per_warp = 32 / lanes;
    for (int q0 = now.num_searched + team_warp * rows_per_warp; q0 < now.num_clusters;
         q0 += team_warps * rows_per_warp) {
        const int q = q0 + lane / lanes,
                  i = q < now.num_clusters ? all.search_order()[q] : -1;
        Neighbour best = no_neighbour();
        // Only one lane has the old nearest cluster. If several lanes had it, it would
        // tie with itself, and the slower comparison of hashes would follow.
        if (i >= 0 && lane % lanes == 0) {
            const int old_nearest = all.nearest()[i];
            best = candidate(all.nearest_e()[i], all.side(i, method), old_nearest,
                             all.side(old_nearest, method), method);
        }
        if (i >= 0) {
            best = update_row<false>(all, matrix, i, all.new_clusters(), now.num_new,
                                     lane % lanes, lanes, method, best);
        }
        publish_nearest(all, publish_to, i, best, lanes);
    }
}

// Update every row and publish its nearest cluster in `publish_to`. Block `team_block`
// of the `team_blocks` blocks of a team takes its own part of the rows. `scratch` is
// shared memory for a `Neighbour` of each warp.
__device__ void update_rows(const Clusters& all, const Matrix& matrix,
                            const Progress& now, int team_block, int team_blocks,
                            NearestCluster* publish_to, int method,
                            Neighbour* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    // Rows that need a search come first, because they take longest. If a block has at
    // least two warps for each of these rows, and the row is longer than PART columns,
    // several warps divide the columns of one row.
    const int rows_per_block = (now.num_searched + team_blocks - 1) / team_blocks;
    const int parts = max(
        min(warps / max(rows_per_block, 1), (now.num_clusters + PART - 1) / PART), 1);
    const int rows_at_once = warps / parts, part = warp % parts;
    Neighbour best = no_neighbour();
    int i = -1;
    for (int q = warp / parts; q < rows_per_block && warp / parts < rows_at_once;
         q += rows_at_once) {
        const int position = q * team_blocks + team_block;  // in `search_order`
        if (position >= now.num_searched) break;
        i = all.search_order()[position];
        best = search_row(all, matrix, i, now.num_clusters, part, parts, method);
        best = warp_nearest(all.first_token(), i, best);
        if (lane == 0 && parts == 1) publish_to[i] = {best.e, best.slot};
    }
    // If parts > 1, then rows_at_once >= rows_per_block. So each warp has searched at
    // most one row, and one entry of scratch is enough.
    if (parts > 1 && lane == 0) scratch[warp] = best;
    // The other rows are given out from the last warp to the first, because the last
    // warps had no row to search, or fewer rows than others, or the last part of a row.
    update_new_columns(all, matrix, now, (warps - 1 - warp) * team_blocks + team_block,
                       team_blocks * warps, publish_to, method);
    if (parts == 1) return;
    __syncthreads();  // all parts of each row have been searched
    if (i >= 0 && part == 0)
        publish_nearest(all, publish_to, i,
                        lane < parts ? scratch[warp + lane] : no_neighbour());
}
