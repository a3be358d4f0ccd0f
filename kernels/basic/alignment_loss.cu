// AR alignment: how well a prior predicts each merged token from those read before it.
//
//   loss = mean_t ‖f(c_t) - x_{t+1}‖² / D             reversed: x_{t-1}
//
// Row t of everything belongs to token t, whichever way the tokens are read.

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
