// Tokens of norm 1; see basic/unit_tokens.cu for the shapes. A warp goes through one
// row three times: for the largest entry, for the norm, and for the result.

// One warp, one row: neighbouring lanes read neighbouring elements.
extern "C" __global__ void unit_tokens(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index() / 32;  // (B, N)
    if (row >= num_rows) return;
    const int lane = threadIdx.x % 32;
    const real_t* x = tokens + row * dim;
    const long long end =
        is_token(mask, row) ? dim : 0;  // all lanes have the same value
    acc_t peak = 0, squares = 0;
    for (long long d = lane; d < end; d += 32) peak = max(peak, abs(widen(x[d])));
    peak = warp_reduce(peak, Greatest());
    for (long long d = lane; d < dim && peak > 0; d += 32)
        squares += widen(x[d]) / peak * (widen(x[d]) / peak);
    const acc_t norm = sqrt(warp_reduce(squares, Add()));
    for (long long d = lane; d < dim; d += 32)
        out[row * dim + d] = peak > 0 ? widen(x[d]) / peak / norm : acc_t(0);
}
