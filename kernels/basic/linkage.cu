// Linkage by the standard greedy algorithm: merge the two closest clusters, N - 1
// times.
//
//   E(A, C) = sum of m_a m_c (1 - cos_ac) over all tokens a in A and c in C
//   E(A u B, C) = E(A, C) + E(B, C)         E is additive
//   average   E / (W_A W_C)                 W: the sum of a cluster's masses m
//   complete  the largest 1 - cos           E is this maximum instead of the sum
//   single    the smallest 1 - cos          E is this minimum instead of the sum
//   ward      2 W_A W_C / (W_A + W_C) |mu_A - mu_C|^2; the height is its square root
//   |mu_A - mu_C|^2 = 2 E(A, C) / (W_A W_C) - E(A, A) / W_A^2 - E(C, C) / W_C^2
//
// mu is the mean of a cluster's unit tokens, weighted by their masses. If no masses are
// given, every m is 1.
//
// One block merges one sequence; each thread works on every blockDim.x-th row. A
// cluster uses the row and column of its first token; the diagonal holds E(A, A).

// Return the distance of clusters i and j; ward's is squared. NaN stays NaN:
// `squared_gap < 0` is false for it.
__device__ acc_t cluster_distance(const acc_t* matrix, const acc_t* cluster_mass,
                                  long long n, long long i, long long j,
                                  long long method) {
    const acc_t e = matrix[i * n + j];
    if (method == COMPLETE || method == SINGLE) return e;
    const acc_t mass_product = cluster_mass[i] * cluster_mass[j];
    if (method != WARD) return e / mass_product;
    const acc_t within = matrix[i * n + i] / (cluster_mass[i] * cluster_mass[i]) +
                         matrix[j * n + j] / (cluster_mass[j] * cluster_mass[j]);
    const acc_t squared_gap = 2 * e / mass_product - within;
    return (squared_gap < 0 ? acc_t(0) : squared_gap) * 2 * mass_product /
           (cluster_mass[i] + cluster_mass[j]);
}

// E(A u B, C) from E(A, C) and E(B, C).
__device__ acc_t e_of_union(acc_t e_ac, acc_t e_bc, long long method) {
    return method == COMPLETE ? max(e_ac, e_bc)
           : method == SINGLE ? min(e_ac, e_bc)
                              : e_ac + e_bc;
}

// `matrix` (B, N, N) holds the cosines and is overwritten by E. Padding and protected
// tokens do not become clusters. `out` (B, N - 1, 4) has a row for each merge, in
// SciPy's format: the two nodes, the height, and the number of tokens. Node i < N is
// token i, and node N + t is merge t. After the last merge, rows are
// (-1, -1, infinity, 0).
// Other shapes: mass, mask and protect (B, N). The other arrays (B, N) are scratch
// memory and describe the cluster of each row: `cluster_mass` is W, or 0 if the row has
// no cluster; `nearest` and `nearest_distance` are the closest cluster with a higher
// index; `node` is the index of the cluster's node in the dendrogram, and `size` is the
// number of its tokens.
extern "C" __global__ void linkage(acc_t* matrix, const acc_t* mass, const bool* mask,
                                   const bool* protect, long long batch,
                                   long long num_tokens, long long method,
                                   acc_t* cluster_mass, acc_t* nearest_distance,
                                   int* nearest, int* node, int* size, double* out) {
    const long long b = blockIdx.x, n = num_tokens, thread = threadIdx.x;
    matrix += b * n * n;
    cluster_mass += b * n, nearest_distance += b * n, nearest += b * n, node += b * n,
        size += b * n;
    out += b * (n - 1) * 4;

    // Divide masses by the largest one, so that their products neither overflow nor
    // vanish. Average, complete and single distances do not depend on the unit of the
    // masses. Ward's squared distances are proportional to that unit, so `mass_unit`
    // scales them back.
    acc_t largest = 0;
    for (long long i = 0; i < n && mass; ++i)
        if (is_token(mask, b * n + i) && !(protect && protect[b * n + i]))
            largest = max(largest, mass[b * n + i]);
    const double mass_unit = method == WARD && largest > 0 ? largest : acc_t(1);
    for (long long i = thread; i < n; i += blockDim.x) {
        const bool is_cluster =
            is_token(mask, b * n + i) && !(protect && protect[b * n + i]);
        // The lower bound lets a token of mass 0 still join its nearest cluster.
        const acc_t relative_mass =
            largest > 0 ? max(mass[b * n + i] / largest, acc_t(LEAST_MASS)) : acc_t(1);
        cluster_mass[i] = is_cluster ? relative_mass : 0;
        node[i] = static_cast<int>(i);
        size[i] = 1;
    }
    __syncthreads();
    // Replace cosines by E of single tokens. A distance below the rounding error of a
    // cosine is 0, so that equal tokens have distance 0.
    for (long long i = thread; i < n; i += blockDim.x)
        for (long long j = 0; j < n; ++j) {
            const acc_t distance = 1 - matrix[i * n + j];
            const acc_t e = distance < NOISE ? acc_t(0) : distance;  // NaN stays NaN
            const bool sums = method != COMPLETE && method != SINGLE;
            matrix[i * n + j] = i == j ? 0
                                : sums ? e * cluster_mass[i] * cluster_mass[j]
                                       : e;
        }

    acc_t height = 0;  // of the last merge
    for (long long t = 0; t < n - 1; ++t) {
        // For each row i, find the closest cluster j > i. The barriers separate this
        // search from the merge before it and from the selection after it.
        __syncthreads();
        for (long long i = thread; i < n; i += blockDim.x) {
            nearest_distance[i] = -MASKED_SCORE, nearest[i] = -1;  // 1e30: none yet
            for (long long j = i + 1; j < n; ++j) {
                if (cluster_mass[i] == 0 || cluster_mass[j] == 0) continue;
                const acc_t d = cluster_distance(matrix, cluster_mass, n, i, j, method);
                if (d < nearest_distance[i])
                    nearest_distance[i] = d, nearest[i] = static_cast<int>(j);
            }
        }
        __syncthreads();
        long long i = 0;  // every thread selects the same closest pair (i, j)
        for (long long k = 1; k < n; ++k)
            if (nearest_distance[k] < nearest_distance[i]) i = k;
        const long long j = nearest[i];
        height = max(height, nearest_distance[i]);  // rounding must not lower heights
        __syncthreads();
        if (j < 0) {  // no pair is left to merge
            if (thread < 4)
                out[4 * t + thread] = thread < 2    ? -1
                                      : thread == 2 ? -double(padding())  // infinity
                                                    : 0;
            continue;
        }
        // Absorb cluster j in cluster i. Thread 0 then writes the row of the
        // dendrogram.
        for (long long k = thread; k < n; k += blockDim.x) {
            if (k == i || k == j) continue;
            matrix[k * n + i] = matrix[i * n + k] =
                e_of_union(matrix[i * n + k], matrix[j * n + k], method);
        }
        if (thread > 0) continue;
        double* row = out + 4 * t;
        row[0] = min(node[i], node[j]);
        row[1] = max(node[i], node[j]);
        row[2] = method == WARD ? sqrt(height * mass_unit) : double(height);
        row[3] = size[i] += size[j];
        // E(A u B, A u B) = E(A, A) + E(B, B) + 2 E(A, B). Only ward reads the
        // diagonal.
        matrix[i * n + i] += matrix[j * n + j] + 2 * matrix[i * n + j];
        node[i] = static_cast<int>(n + t);
        cluster_mass[i] += cluster_mass[j];
        cluster_mass[j] = 0;
    }
}
