// AR alignment: how well a prior predicts each merged token from those read before it.
//
//   c_t = mean of the first t + 1 tokens read        (forward from the first token on,
//   loss = mean_t ‖f(c_t) - x_{t+1}‖² / D             reversed from the last one back)
//   f(c) = W2 relu(W1 c + b1) + b2                   both layers by `linear`
//
// `counts` is K for each sequence, or null where all have num_groups.

// The row of x that is read t-th.
__device__ long long reading(long long t, long long count, long long reversed) {
    return reversed ? count - 1 - t : t;
}

// One thread walks one column, so that every mean is the last sum and one term more.
extern "C" __global__ void prefix_means(const real_t* merged, const int* counts,
                                        long long batch, long long num_groups,
                                        long long dim, long long reversed, acc_t* out) {
    const long long index = thread_index();  // (B, D)
    if (index >= batch * dim) return;
    const long long b = index / dim, d = index % dim;
    const long long count = counts ? counts[b] : num_groups;
    const long long column = b * num_groups * dim + d;  // of (B, K, D)

    acc_t sum = 0;
    for (long long t = 0; t < num_groups; ++t) {
        if (t < count) sum += widen(merged[column + reading(t, count, reversed) * dim]);
        out[column + t * dim] = t < count ? sum / acc_t(t + 1) : 0;
    }
}

// y = x Wᵀ + b, weight (out, in), optionally relu(y).
extern "C" __global__ void linear(const real_t* input, const real_t* weight,
                                  const real_t* bias, long long num_rows,
                                  long long in_dim, long long out_dim, long long relu,
                                  real_t* out) {
    const long long index = thread_index();  // (rows, out)
    if (index >= num_rows * out_dim) return;
    const real_t* x = input + index / out_dim * in_dim;
    const real_t* w = weight + index % out_dim * in_dim;
    acc_t sum = 0;
    for (long long i = 0; i < in_dim; ++i) sum += widen(x[i]) * widen(w[i]);
    sum += widen(bias[index % out_dim]);
    store(out + index, relu && sum < 0 ? acc_t(0) : sum);
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
    const long long count = counts ? counts[b] : num_groups;

    acc_t squares = 0;
    if (t + 1 < count) {
        const long long target = b * num_groups + reading(t + 1, count, reversed);
        for (long long d = 0; d < dim; ++d) {
            const acc_t x = widen(merged[target * dim + d]);
            const acc_t error = prediction[index * dim + d] - x;
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
    const long long count = counts ? counts[b] : num_groups;
    acc_t sum = 0;
    for (long long t = 0; t + 1 < count; ++t) sum += errors[b * num_groups + t];
    out[b] = count > 1 ? sum / acc_t(count - 1) : 0;
}
