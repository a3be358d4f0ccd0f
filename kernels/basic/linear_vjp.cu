// Gradients of linear maps, see basic/linear.cu. Here dx is the gradient of a loss with
// respect to x. For a layer y = x Wᵀ + b,
//
//   dx = dy W,   dW = dyᵀ x,   db = sum dy
//
// One thread, one output.

// dx = dy W. If `input` is not null, it is the output of a ReLU, and the gradient
// through that ReLU is 0 at every element that is not above 0.
// Shapes: gradient (rows, out), weight (out, in), input and out (rows, in).
extern "C" __global__ void linear_vjp(const real_t* gradient, const real_t* weight,
                                      const real_t* input, long long num_rows,
                                      long long in_dim, long long out_dim,
                                      real_t* out) {
    const long long index = thread_index();  // (rows, in)
    if (index >= num_rows * in_dim) return;
    const real_t* dy = gradient + index / in_dim * out_dim;  // (out,)
    const real_t* w = weight + index % in_dim;               // start of a column
    acc_t sum = 0;
    for (long long o = 0; o < out_dim; ++o) sum += widen(dy[o]) * widen(w[o * in_dim]);
    store(out + index, input && !(widen(input[index]) > 0) ? acc_t(0) : sum);
}

// dW = dyᵀ x.
// Shapes: gradient (rows, out), input (rows, in), out (out, in).
extern "C" __global__ void weight_vjp(const real_t* gradient, const real_t* input,
                                      long long num_rows, long long in_dim,
                                      long long out_dim, real_t* out) {
    const long long index = thread_index();  // (out, in)
    if (index >= out_dim * in_dim) return;
    const real_t* dy = gradient + index / in_dim;  // start of a column
    const real_t* x = input + index % in_dim;      // start of a column
    acc_t sum = 0;
    for (long long r = 0; r < num_rows; ++r)
        sum += widen(dy[r * out_dim]) * widen(x[r * in_dim]);
    store(out + index, sum);
}

// db = sum dy.
// Shapes: gradient (rows, out), out (out,).
extern "C" __global__ void bias_vjp(const real_t* gradient, long long num_rows,
                                    long long out_dim, real_t* out) {
    const long long index = thread_index();  // (out,)
    if (index >= out_dim) return;
    acc_t sum = 0;
    for (long long r = 0; r < num_rows; ++r)
        sum += widen(gradient[r * out_dim + index]);
    store(out + index, sum);
}
