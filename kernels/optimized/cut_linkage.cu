// Cuts of dendrograms, and labels of their groups, in one launch. The formula is in
// basic/cut_linkage.cu, and `write_labels` in numbering.cuh. One block cuts one
// sequence.
//
// A block has GROUP_THREADS threads, or fewer for a short sequence. The launch bound
// allows one block on a multiprocessor, so that this block may use all registers.
// Without this bound the compiler would save some registers for a second block.

// Call use(term(0)), use(term(1)), ... in this order in thread 0. All threads compute
// terms and write them to `terms`, shared memory for one term of each thread.
template <class Term, class Use>
__device__ __forceinline__ void in_order(double* terms, long long count, Term term,
                                         Use use) {
    for (long long i0 = 0; i0 < count; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        __syncthreads();  // thread 0 has used the last terms
        if (i < count) terms[threadIdx.x] = term(i);
        __syncthreads();
        if (threadIdx.x > 0) continue;
        const int stop = static_cast<int>(min(count - i0, (long long)blockDim.x));
        for (int t = 0; t < stop; ++t) use(terms[t]);
    }
}

// Return `merges` of thread 0 to all threads.
__device__ __forceinline__ long long of_first_thread(long long merges, double* terms) {
    __syncthreads();
    if (threadIdx.x == 0) terms[0] = static_cast<double>(merges);
    __syncthreads();
    return static_cast<long long>(terms[0]);
}

// Return the number of merges up to the first height above the bound, or up to a NaN.
// `rows` are those of the dendrogram, (N - 1, 4). `terms` is in shared memory.
__device__ __forceinline__ long long merges_up_to(const double* rows,
                                                  long long num_rows,
                                                  double max_distance, double* terms) {
    long long merges = 0;
    bool within = true;
    const auto height = [&](long long r) { return rows[4 * r + 2]; };
    in_order(terms, num_rows, height, [&](double h) {
        within = within && h <= max_distance;
        merges += within;
    });
    return of_first_thread(merges, terms);
}

// Return the largest number of merges whose error is within the bound. One thread adds
// in double and in a fixed order, so that every run makes the same decision. `scratch`
// and `terms` are in shared memory.
__device__ __forceinline__ long long merges_within(const double* rows,
                                                   const acc_t* mass, const bool* mask,
                                                   const bool* protect,
                                                   long long num_tokens,
                                                   long long num_rows, double max_error,
                                                   acc_t* scratch, double* terms) {
    acc_t largest = 0;  // of the free tokens
    for (long long i = threadIdx.x; i < num_tokens && mass; i += blockDim.x)
        if (is_token(mask, i) && !(protect && protect[i]))
            largest = max(largest, mass[i]);
    largest = block_reduce(largest, scratch, Greatest());
    const double peak = largest > 0 ? largest : 1;

    // total = sum of masses, divided by `peak`; each is at least LEAST_MASS
    double total = 0, of_all = 0, error = 0;
    const auto weight = [&](long long i) {
        if (!is_token(mask, i)) return 0.0;
        return largest > 0 ? max(mass[i] / peak, LEAST_MASS) : 1.0;
    };
    in_order(terms, num_tokens, weight, [&](double term) { total += term; });

    // error = sum of h^2 / 2, also divided by `peak`. The count of merges
    // ends at the first one outside the bound, and also at a NaN.
    long long merges = 0;
    bool within = true;
    const auto cost = [&](long long r) {
        return rows[4 * r + 2] * rows[4 * r + 2] / peak / 2;
    };
    in_order(terms, num_rows, cost, [&](double term) { of_all += term; });
    in_order(terms, num_rows, cost, [&](double term) {
        error += term;
        within = within && error <= max_error * total + ERROR_ROUNDING * of_all;
        merges += within;
    });
    return of_first_thread(merges, terms);
}

// Find the topmost node above every node, by pointer doubling. above[i] starts as the
// parent of node i, or i itself at the top. Each round sets new_above[i] =
// above[above[i]], which doubles the number of levels between i and above[i], and then
// exchanges the two arrays (2N,).
__device__ __forceinline__ void climb(const double* rows, long long num_tokens,
                                      long long merges, int*& above, int*& new_above) {
    const long long num_nodes = num_tokens + merges;
    for (long long i = threadIdx.x; i < num_nodes; i += blockDim.x) new_above[i] = -1;
    __syncthreads();
    // Rows are not checked on a GPU. Only a parent in a later row is accepted: this
    // excludes cycles, whatever the rows hold. If a node has two parents, the one in
    // the earlier row counts. The index of a row is stored reversed, as merges - 1 - r,
    // so that the maximum is the earliest row.
    for (long long entry = threadIdx.x; entry < 2 * merges; entry += blockDim.x) {
        const long long r = entry / 2;  // entry: in (merges, 2), the nodes that merge
        const double node = rows[4 * r + entry % 2];
        if (0 <= node && node < num_tokens + r)
            atomicMax(new_above + static_cast<long long>(node),
                      static_cast<int>(merges - 1 - r));
    }
    __syncthreads();
    for (long long i = threadIdx.x; i < num_nodes; i += blockDim.x)
        above[i] =
            static_cast<int>(new_above[i] < 0 ? i : num_nodes - 1 - new_above[i]);
    __syncthreads();
    for (long long reach = 1; reach < merges; reach *= 2) {
        for (long long i = threadIdx.x; i < num_nodes; i += blockDim.x)
            new_above[i] = above[above[i]];
        int* const old_above = above;
        above = new_above, new_above = old_above;
        __syncthreads();
    }
}

// `max_error` limits the error of the merges, and `max_distance` their heights. A
// negative limit is none. Without limits, K decides.
// Shapes: dendrogram (B, N - 1, 4), mass, mask, protect and out (B, N), counts (B,),
// nodes (B, 4N), which is scratch memory for the two arrays (2N,) of `climb`.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    cut_linkage(const double* dendrogram, const acc_t* mass, const bool* mask,
                const bool* protect, const int* counts, long long batch,
                long long num_tokens, long long num_groups, double max_error,
                double max_distance, long long by_first, int* nodes, int* out) {
    __shared__ int scratch[32];
    __shared__ acc_t partial[32];
    __shared__ double terms[GROUP_THREADS];
    const long long b = blockIdx.x, sequence_start = b * num_tokens;  // in (B, N)
    const double* rows = dendrogram + b * (num_tokens - 1) * 4;       // (N - 1, 4)
    const bool* valid = mask ? mask + sequence_start : nullptr;       // (N,)
    const bool* protected_tokens = protect ? protect + sequence_start : nullptr;
    long long tokens = 0, free_tokens = 0;
    for (long long i0 = 0; i0 < num_tokens; i0 += blockDim.x) {
        const long long i = i0 + threadIdx.x;
        int count;
        const bool token = i < num_tokens && is_token(valid, i);
        block_rank(token, scratch, &count);
        tokens += count;
        block_rank(token && !(protect && protected_tokens[i]), scratch, &count);
        free_tokens += count;
    }
    const long long max_merges = max(free_tokens - 1, 0ll);
    long long merges =
        min(max_merges, max(tokens - count_of(counts, b, num_groups), 0ll));
    if (max_error >= 0)
        merges = merges_within(rows, mass ? mass + sequence_start : nullptr, valid,
                               protected_tokens, num_tokens, max_merges, max_error,
                               partial, terms);
    else if (max_distance >= 0)
        merges = merges_up_to(rows, max_merges, max_distance, terms);

    int *above = nodes + 4 * sequence_start, *new_above = above + 2 * num_tokens;
    climb(rows, num_tokens, merges, above, new_above);
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x)
        if (!is_token(valid, i)) above[i] = -1;
    write_labels(above, num_tokens, by_first, new_above, scratch, out + sequence_start);
}
