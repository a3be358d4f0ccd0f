// Tokens scaled to norm 1: x / ‖x‖, or 0 if the norm is 0 and for padding.
//
// A token is divided by its largest absolute entry first, so that no square overflows.
// One thread, one token.
// Shapes: tokens and out (rows, D), mask (rows,), for rows = B N.
extern "C" __global__ void unit_tokens(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index();  // (B, N)
    if (row >= num_rows) return;
    const real_t* x = tokens + row * dim;
    acc_t peak = 0, squares = 0;
    for (long long d = 0; d < dim && is_token(mask, row); ++d)
        peak = max(peak, abs(widen(x[d])));
    for (long long d = 0; d < dim && peak > 0; ++d)
        squares += widen(x[d]) / peak * (widen(x[d]) / peak);
    const acc_t norm = sqrt(squares);
    for (long long d = 0; d < dim; ++d)
        out[row * dim + d] = peak > 0 ? widen(x[d]) / peak / norm : acc_t(0);
}
