// Vector-Jacobian product of the attention received; see
// basic/attention_received_vjp.cu for the formula and the shapes.

// One thread writes 16 bytes of a row.
extern "C" __global__ void attention_received_vjp(const acc_t* weights,
                                                  const bool* mask, long long outer,
                                                  long long batch, long long heads,
                                                  long long num_tokens,
                                                  long long causal, real_t* out) {
    const long long vectors_per_row = (num_tokens + WIDTH - 1) / WIDTH;
    const long long row = thread_index() / vectors_per_row;  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long i = row % num_tokens;
    const long long column = thread_index() % vectors_per_row * WIDTH;
    const long long sequence_start = row / num_tokens / heads % batch * num_tokens;
    // The columns after `last` have gradient 0.
    const long long last = !is_token(mask, sequence_start + i) ? -1
                           : causal                            ? i
                                                               : num_tokens - 1;
    const acc_t* h = weights + row - i;  // (N,) of this head
    acc_t values[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; ++k)
        values[k] = column + k <= last ? h[column + k] : acc_t(0);
    store_vector(out + row * num_tokens + column, values, num_tokens - column);
}
