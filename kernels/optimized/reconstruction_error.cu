// Reconstruction error; see basic/reconstruction_error.cu for the formulas and the
// shapes.

// ‖x_i - x̂_i‖² and ‖x_i‖². One warp, one token: each lane reads 16 bytes at a time.
extern "C" __global__ void token_errors(const real_t* tokens, const real_t* merged,
                                        const int* labels, long long batch,
                                        long long num_tokens, long long dim,
                                        long long num_groups, acc_t* errors,
                                        acc_t* squares) {
    const long long index = thread_index() / 32;  // (B, N)
    if (index >= batch * num_tokens) return;
    const int k = group_of(labels[index], num_groups);
    const real_t* token = tokens + index * dim;
    const real_t* merged_token = merged + (index / num_tokens * num_groups + k) * dim;
    acc_t error = 0, square = 0;
    // All lanes of a warp have the same token and the same k, so the lanes do not
    // diverge.
    for (long long d = threadIdx.x % 32 * WIDTH; k >= 0 && d < dim; d += 32 * WIDTH) {
        acc_t x[WIDTH], y[WIDTH];
        load_vector(x, token + d, dim - d);
        load_vector(y, merged_token + d, dim - d);
        for (int i = 0; i < WIDTH; ++i) {
            error += (x[i] - y[i]) * (x[i] - y[i]);
            square += x[i] * x[i];
        }
    }
    error = warp_reduce(error, Add());
    square = warp_reduce(square, Add());
    if (threadIdx.x % 32 == 0) {
        errors[index] = error;
        squares[index] = square;
    }
}

// The sum of the errors divided by the sum of the squares. One block, one sequence.
extern "C" __global__ void reconstruction_error(const acc_t* errors,
                                                const acc_t* squares, long long batch,
                                                long long num_tokens, acc_t* out) {
    __shared__ acc_t scratch[32];
    const long long sequence_start = blockIdx.x * num_tokens;
    acc_t error = 0, square = 0;
    for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        error += errors[sequence_start + i];
        square += squares[sequence_start + i];
    }
    error = block_reduce(error, scratch, Add());
    square = block_reduce(square, scratch, Add());
    if (threadIdx.x == 0) out[blockIdx.x] = error == 0 ? 0 : error / square;
}
