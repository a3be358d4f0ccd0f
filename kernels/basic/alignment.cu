// AR alignment: how well a prior predicts each merged token from those read before it.
//
//   c_t = mean of x_1 .. x_t                         reversed: of x_t .. x_K
//   loss = mean_t ‖f(c_t) - x_{t+1}‖² / D             reversed: x_{t-1}
//   f(c) = W2 relu(W1 c + b1) + b2                   both layers by `linear`
//
// Row t of everything belongs to token t, whichever way the tokens are read.

// The row that is read t-th. Rows behind the last token keep their places.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed && t < count ? count - 1 - t : t;
}

// One thread walks one column, so that every mean is the last sum and one term more.
// Padding has mean 0.
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = count_of(counts, b, num_groups);
    const long long column = b * num_groups * dim + d;  // of (B, K, D)

    acc_t sum = 0;
    for (long long t = 0; t < num_groups; ++t) {
        const long long row = column + reading(t, count, reversed) * dim;
        if (t < count) sum += widen(merged[row]);
        out[row] = t < count ? sum / acc_t(t + 1) : 0;
    }
}

// y = activated(x Wᵀ + b) + residual, weight (out, in); no residual if it is null.
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
    sum = activated(sum + widen(bias[index % out_dim]), activation);
    store(out + index, residual ? sum + widen(residual[index]) : sum);
}

// The error of every prediction; a row that predicts no token has none.
extern "C" __global__ void prediction_errors(const acc_t* prediction,
                                             const real_t* merged, const int* counts,
                                             long long batch, long long num_groups,
                                             long long dim, long long reversed,
                                             acc_t* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const long long b = index / num_groups, t = index % num_groups;
    const long long count = count_of(counts, b, num_groups);

    acc_t squares = 0;
    const long long target = reversed ? t - 1 : t + 1;
    if (t < count && 0 <= target && target < count) {
        const real_t* x = merged + (b * num_groups + target) * dim;  // (D,)
        for (long long d = 0; d < dim; ++d) {
            const acc_t error = prediction[index * dim + d] - widen(x[d]);
            squares += error * error;
        }
    }
    out[index] = squares / dim;
}

// The mean of a sequence's K - 1 errors; with one token there is nothing to predict.
extern "C" __global__ void alignment_loss(const acc_t* errors, const int* counts,
                                          long long batch, long long num_groups,
                                          acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    const long long count = count_of(counts, b, num_groups);
    acc_t sum = 0;
    for (long long t = 0; t < count; ++t) sum += errors[b * num_groups + t];
    out[b] = count > 1 ? sum / acc_t(count - 1) : 0;
}
