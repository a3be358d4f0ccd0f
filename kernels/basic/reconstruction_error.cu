// Reconstruction error: how much of the tokens is lost when they are merged.
//
//   reconstruction error = ‖X - X̂‖² / ‖X‖²,   x̂_i = the merged token of i's group
//
// One thread, one output. Sums run in index order, so that every run gives the same
// bits.

// ‖x_i - x̂_i‖² and ‖x_i‖² of every token; both are 0 for padding (label -1).
// Shapes: tokens (B, N, D), merged (B, K, D), labels, errors and squares (B, N).
extern "C" __global__ void token_errors(const real_t* tokens, const real_t* merged,
                                        const int* labels, long long batch,
                                        long long num_tokens, long long dim,
                                        long long num_groups, acc_t* errors,
                                        acc_t* squares) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const int k = group_of(labels[index], num_groups);
    acc_t error = 0, square = 0;
    if (k >= 0) {
        const real_t* x = tokens + index * dim;                                  // (D,)
        const real_t* y = merged + (index / num_tokens * num_groups + k) * dim;  // (D,)
        for (long long d = 0; d < dim; ++d) {
            const acc_t difference = widen(x[d]) - widen(y[d]);
            error += difference * difference;
            square += widen(x[d]) * widen(x[d]);
        }
    }
    errors[index] = error;
    squares[index] = square;
}

// The error of every sequence. If all tokens are zero, the error is 0 when nothing is
// lost, and infinite otherwise.
// Shapes: errors and squares (B, N) from `token_errors`, out (B,).
extern "C" __global__ void reconstruction_error(const acc_t* errors,
                                                const acc_t* squares, long long batch,
                                                long long num_tokens, acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    acc_t error = 0, square = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        error += errors[i];
        square += squares[i];
    }
    out[b] = error == 0 ? 0 : error / square;
}
