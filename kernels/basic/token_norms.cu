// Norms of tokens. One thread, one output.
//
//   ‖x‖₂ = sqrt(sum_d x_d²)

// The norm of every row; 0 for padding.
// Shapes: tokens (rows, D), mask and out (rows,), for rows = B N.
extern "C" __global__ void token_norms(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index();  // (B, N)
    if (row >= num_rows) return;
    acc_t squares = 0;
    for (long long d = 0; d < dim && is_token(mask, row); ++d) {
        const acc_t x = widen(tokens[row * dim + d]);
        squares += x * x;
    }
    out[row] = sqrt(squares);
}
