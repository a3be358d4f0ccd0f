// Norms of tokens; see basic/token_norms.cu for the shapes. A warp reads one row, so
// that neighbouring lanes read neighbouring addresses.

// One warp, one row: each lane reads 16 bytes at a time.
extern "C" __global__ void token_norms(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index() / 32;  // (B, N)
    if (row >= num_rows) return;
    acc_t squares = 0;
    const long long end =
        is_token(mask, row) ? dim : 0;  // all lanes have the same value
    for (long long d = threadIdx.x % 32 * WIDTH; d < end; d += 32 * WIDTH) {
        acc_t x[WIDTH];
        load_vector(x, tokens + row * dim + d, dim - d);
        for (int i = 0; i < WIDTH; ++i) squares += x[i] * x[i];
    }
    squares = warp_reduce(squares, Add());
    if (threadIdx.x % 32 == 0) out[row] = sqrt(squares);
}
