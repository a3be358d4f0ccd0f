// Vector-Jacobian product of the norms in norm saliency, n = ‖x‖.
//
//   dn / dx = x / n                        0 where n = 0
//
// `gradient` is that of the norms. One thread, one output.
// Shapes: gradient and norms (B, N), tokens and out (B, N, D).
extern "C" __global__ void token_norms_vjp(const acc_t* gradient, const real_t* tokens,
                                           const acc_t* norms, long long num_rows,
                                           long long dim, real_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= num_rows * dim) return;
    const acc_t norm = norms[index / dim];
    const acc_t direction = norm > 0 ? widen(tokens[index]) / norm : acc_t(0);
    store(out + index, norm > 0 ? gradient[index / dim] * direction : acc_t(0));
}
