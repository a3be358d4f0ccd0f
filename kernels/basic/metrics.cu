// Euclidean distances, in the form that the linkage kernels read.
//
//   v_i = (x_i - o) / u            o: an offset, u: a unit, both of one sequence
//   e_ij = |v_i - v_j|^2 / 2 = g_ii / 2 + g_jj / 2 - g_ij,   g_ij = v_i . v_j
//
// The linkage kernels compute 1 - cos from cosines. So here the matrix receives 1 - d
// instead of a cosine, where d = e_ij for ward, and d = |v_i - v_j| = sqrt(2 e_ij) for
// the other methods. The kernel cosine_similarity.cu computes g, with the unit u in the
// place of the norms.
//
// One thread computes one output.

// Whether each token is neither padding nor protected.
// Shapes: mask, protect and out (B, N).
extern "C" __global__ void free_mask(const bool* mask, const bool* protect,
                                     long long num_elements, bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= num_elements) return;
    out[index] = is_token(mask, index) && !protect[index];
}

// Labels that put all tokens into group 0: the mean of this group is the offset o.
// Shapes: mask and out (B, N).
extern "C" __global__ void one_group(const bool* mask, long long num_elements,
                                     int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= num_elements) return;
    out[index] = is_token(mask, index) ? 0 : -1;
}

// x - o, or 0 for padding.
// Shapes: tokens and out (B, N, D), offsets (B, D), mask (B, N).
extern "C" __global__ void centered_tokens(const real_t* tokens, const real_t* offsets,
                                           const bool* mask, long long batch,
                                           long long num_tokens, long long dim,
                                           acc_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= batch * num_tokens * dim) return;
    const long long token = index / dim, d = index % dim;
    const real_t offset = offsets[token / num_tokens * dim + d];
    out[index] =
        is_token(mask, token) ? widen(tokens[index]) - widen(offset) : acc_t(0);
}

// The unit u of each sequence, once for each of its tokens: the largest norm. If all
// norms are 0, the unit is 1.
// Shapes: norms and out (B, N).
extern "C" __global__ void largest_norms(const acc_t* norms, long long batch,
                                         long long num_tokens, acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    acc_t largest = 0;
    for (long long i = 0; i < num_tokens; ++i)
        largest = max(largest, norms[b * num_tokens + i]);
    for (long long i = 0; i < num_tokens; ++i)
        out[b * num_tokens + i] = largest > 0 ? largest : acc_t(1);
}

// g_ii of each token. A copy, because `euclidean_similarity` overwrites the matrix.
// Shapes: matrix (B, N, N), out (B, N).
extern "C" __global__ void diagonals(const acc_t* matrix, long long batch,
                                     long long num_tokens, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    out[index] = matrix[index * num_tokens + index % num_tokens];
}

// Replace g_ij by 1 - d, with d = e_ij if `squared`, else sqrt(2 e_ij). NaN stays NaN,
// except on the diagonal, which is 1.
// Shapes: diagonal (B, N), matrix (B, N, N).
extern "C" __global__ void euclidean_similarity(const acc_t* diagonal, long long batch,
                                                long long num_tokens, long long squared,
                                                acc_t* matrix) {
    const long long index = thread_index();  // (B, N, N)
    if (index >= batch * num_tokens * num_tokens) return;
    // An e_ij below NOISE times its first two terms is 0.
    const long long i = index / num_tokens;  // (B, N)
    const long long column = index % num_tokens,
                    j = i / num_tokens * num_tokens + column;
    const acc_t sum = diagonal[i] + diagonal[j];  // the same bits for (j, i)
    const acc_t e = sum / 2 - matrix[index];
    const acc_t half_square = e < NOISE * (sum / 2) || i == j ? acc_t(0) : e;
    matrix[index] = 1 - (squared ? half_square : sqrt(2 * half_square));
}

// Multiply the heights of the dendrograms by the unit of their sequence: distances of v
// become distances of x.
// Shapes: units (B, num_rows + 1), dendrograms (B, num_rows, 4).
extern "C" __global__ void scale_heights(const acc_t* units, long long batch,
                                         long long num_rows, double* dendrograms) {
    const long long index = thread_index();  // (B, num_rows)
    if (index >= batch * num_rows) return;
    dendrograms[4 * index + 2] *= units[index / num_rows * (num_rows + 1)];
}
