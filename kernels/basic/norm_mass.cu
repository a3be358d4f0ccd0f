// Norm mass: what the K largest norms are of all.
//
//   norm mass = sum of the K largest ‖x‖ / sum of all ‖x‖
//
// One thread, one output; sums run in index order.

// `selected` marks the K largest norms. Of no norm at all, every part is all of it.
extern "C" __global__ void norm_mass(const acc_t* norms, const bool* selected,
                                     long long batch, long long num_tokens,
                                     acc_t* out) {
    const long long b = thread_index();  // (B,)
    if (b >= batch) return;
    acc_t kept = 0, total = 0;
    for (long long i = b * num_tokens; i < (b + 1) * num_tokens; ++i) {
        total += norms[i];
        if (selected[i]) kept += norms[i];
    }
    out[b] = total > 0 ? kept / total : 1;
}
