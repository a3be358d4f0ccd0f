// Norm mass: the fraction of all norms that the K largest norms hold.
//
//   norm mass = sum of the K largest ‖x‖ / sum of all ‖x‖
//
// One thread, one output. Sums run in index order, so that every run gives the same
// bits.

// `selected` is true for the K largest norms. If all norms are 0, the norm mass is 1.
// Shapes: norms and selected (B, N), out (B,).
extern "C" __global__ void norm_mass(const acc_t* norms, const bool* selected,
                                     long long batch, long long num_tokens,
                                     acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    acc_t selected_sum = 0, total = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        total += norms[i];
        if (selected[i]) selected_sum += norms[i];
    }
    out[b] = total > 0 ? selected_sum / total : 1;
}
