// Linkage by the algorithm of the textbook: merge the two closest clusters, N - 1
// times.
//
//   E(A, C) = sum of m_a m_c (1 - cos)      adds up:  E(A u B, C) = E(A, C) + E(B, C)
//   average   E / (W_A W_C)                 W: total mass; one token has mass 1 or m
//   complete  the largest 1 - cos           E is this maximum instead of the sum
//   single    the smallest 1 - cos          E is this minimum instead of the sum
//   ward      2 W_A W_C / (W_A + W_C) |mu_A - mu_C|^2; the height is its square root
//   |mu_A - mu_C|^2 = 2 E(A, C) / (W_A W_C) - E(A, A) / W_A^2 - E(C, C) / W_C^2
//
// One block merges one sequence; a thread has every blockDim.x-th row. A cluster uses
// the row and column of its first token; the diagonal holds E(A, A).

// The distance of clusters i and j; ward's is squared. A NaN stays one.

__device__ acc_t cluster_distance(const acc_t* matrix, const acc_t* weight, long long n,
                                  long long i, long long j, long long method) {
    const acc_t e = matrix[i * n + j];
    if (method == COMPLETE || method == SINGLE) return e;
    const acc_t area = weight[i] * weight[j];
    if (method != WARD) return e / area;
    const acc_t within = matrix[i * n + i] / (weight[i] * weight[i]) +
                         matrix[j * n + j] / (weight[j] * weight[j]);
    const acc_t gap = 2 * e / area - within;
    return (gap < 0 ? acc_t(0) : gap) * 2 * area / (weight[i] + weight[j]);
}

// E(A u B, C) from E(A, C) and E(B, C).
__device__ acc_t joined(acc_t x, acc_t y, long long method) {
    return method == COMPLETE ? max(x, y) : method == SINGLE ? min(x, y) : x + y;
}

// matrix (B, N, N) holds the cosines and is overwritten. weight, node and size (B, N)
// are the clusters' masses (0: no cluster in this row), numbers in the dendrogram, and
// numbers of tokens. lows and nearest (B, N) are the distance and the index of the
// closest cluster with a higher index than the row's.
extern "C" __global__ void linkage(acc_t* matrix, const acc_t* mass, const bool* mask,
                                   const bool* protect, long long batch,
                                   long long num_tokens, long long method,
                                   acc_t* weight, acc_t* lows, int* nearest, int* node,
                                   int* size, double* out) {
    const long long b = blockIdx.x, n = num_tokens, thread = threadIdx.x;
    matrix += b * n * n;
    weight += b * n, lows += b * n, nearest += b * n, node += b * n, size += b * n;
    out += b * (n - 1) * 4;

    // Divide masses by the largest one; `unit` scales ward's heights back.
    acc_t top = 0;
    for (long long i = 0; i < n && mass; ++i)
        if (is_token(mask, b * n + i) && !(protect && protect[b * n + i]))
            top = max(top, mass[b * n + i]);
    const double unit = method == WARD && top > 0 ? top : acc_t(1);
    for (long long i = thread; i < n; i += blockDim.x) {
        const bool here = is_token(mask, b * n + i) && !(protect && protect[b * n + i]);
        // The lower bound lets a token of mass 0 still join its nearest cluster.
        const acc_t own =
            top > 0 ? max(mass[b * n + i] / top, acc_t(LEAST_MASS)) : acc_t(1);
        weight[i] = here ? own : 0;
        node[i] = static_cast<int>(i);
        size[i] = 1;
    }
    __syncthreads();
    // Replace cosines by E of single tokens.
    for (long long i = thread; i < n; i += blockDim.x)
        for (long long j = 0; j < n; ++j) {
            const acc_t cosine = matrix[i * n + j];  // a NaN stays one
            const acc_t e = cosine > 1 ? acc_t(0) : 1 - cosine;
            const bool sums = method != COMPLETE && method != SINGLE;
            matrix[i * n + j] = i == j ? 0 : sums ? e * weight[i] * weight[j] : e;
        }

    for (long long row = 0; row < n - 1; ++row) {
        // Find the closest cluster behind each row.
        __syncthreads();
        for (long long i = thread; i < n; i += blockDim.x) {
            lows[i] = -MASKED_SCORE, nearest[i] = -1;
            for (long long j = i + 1; j < n; ++j) {
                if (weight[i] == 0 || weight[j] == 0) continue;
                const acc_t d = cluster_distance(matrix, weight, n, i, j, method);
                if (d < lows[i]) lows[i] = d, nearest[i] = static_cast<int>(j);
            }
        }
        __syncthreads();
        long long i = 0;  // of the closest pair (i, j), in every thread
        for (long long k = 1; k < n; ++k)
            if (lows[k] < lows[i]) i = k;
        const long long j = nearest[i];
        __syncthreads();
        if (j < 0) {  // one cluster is left
            if (thread < 4)
                out[4 * row + thread] = thread < 2    ? -1
                                        : thread == 2 ? -double(padding())
                                                      : 0;
            continue;
        }
        // Put cluster j into cluster i.
        for (long long k = thread; k < n; k += blockDim.x) {
            if (k == i || k == j) continue;
            matrix[k * n + i] = matrix[i * n + k] =
                joined(matrix[i * n + k], matrix[j * n + k], method);
        }
        if (thread > 0) continue;
        double* merge = out + 4 * row;
        merge[0] = min(node[i], node[j]);
        merge[1] = max(node[i], node[j]);
        merge[2] = method == WARD ? sqrt(lows[i] * unit) : double(lows[i]);
        merge[3] = size[i] += size[j];
        // E(A u B, A u B) = E(A, A) + E(B, B) + 2 E(A, B)
        matrix[i * n + i] += matrix[j * n + j] + 2 * matrix[i * n + j];
        node[i] = static_cast<int>(n + row);
        weight[i] += weight[j];
        weight[j] = 0;
    }
}
