// The linear maps of the priors, and the normalizations (layer, RMS) before them.
//
//   f(c) = W2 relu(W1 c + b1) + b2                   two calls of `linear`
//   norm(x) = (x - mean) / sqrt(var + eps) * gain + shift
//
// One thread, one output.

// y = activated(x Wᵀ + b) + residual; `activated` is in common.cuh. The bias and the
// residual are left out if they are null.
// Shapes: input (rows, in), weight (out, in), bias (out,), residual and out
// (rows, out).
extern "C" __global__ void linear(const real_t* input, const real_t* weight,
                                  const real_t* bias, const real_t* residual,
                                  long long num_rows, long long in_dim,
                                  long long out_dim, long long activation,
                                  real_t* out) {
    const long long index = thread_index();  // (rows, out)
    if (index >= num_rows * out_dim) return;
    const real_t* x = input + index / out_dim * in_dim;
    const real_t* w = weight + index % out_dim * in_dim;
    acc_t sum = 0;
    for (long long i = 0; i < in_dim; ++i) sum += widen(x[i]) * widen(w[i]);
    if (bias) sum += widen(bias[index % out_dim]);
    sum = activated(sum, activation);
    store(out + index, residual ? sum + widen(residual[index]) : sum);
}

// norm(x) of every row: the layer norm with `shift`; if `shift` is null, the RMS norm,
// where the mean is taken as 0.
// Shapes: input and out (rows, D), gain and shift (D,).
extern "C" __global__ void normalize(const real_t* input, const real_t* gain,
                                     const real_t* shift, long long num_rows,
                                     long long dim, double epsilon, real_t* out) {
    const long long index = thread_index();  // (rows, D)
    if (index >= num_rows * dim) return;
    const long long d = index % dim;
    const real_t* x = input + index - d;

    acc_t mean = 0, squares = 0;
    for (long long k = 0; shift && k < dim; ++k) mean += widen(x[k]) / dim;
    for (long long k = 0; k < dim; ++k) {
        const acc_t centred = widen(x[k]) - mean;
        squares += centred * centred;
    }
    const acc_t y =
        (widen(x[d]) - mean) / sqrt(squares / dim + acc_t(epsilon)) * widen(gain[d]);
    store(out + index, shift ? y + widen(shift[d]) : y);
}
