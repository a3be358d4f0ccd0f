// Unmerging. One thread, one output. Labels (B, N) are 0 .. K-1, or -1 for padding.
//
//   x̂_i = the merged token of the group of token i

// Every token becomes the merged token of its group; padding becomes zero.
// Shapes: merged (B, K, D), labels (B, N), out (B, N, D).
extern "C" __global__ void unmerge_tokens(const real_t* merged, const int* labels,
                                          long long batch, long long num_tokens,
                                          long long dim, long long num_groups,
                                          real_t* out) {
    const long long index = thread_index();  // (B, N, D)
    if (index >= batch * num_tokens * dim) return;
    const long long token = index / dim, b = token / num_tokens;
    const int k = group_of(labels[token], num_groups);
    if (k < 0)
        store(out + index, acc_t(0));
    else
        out[index] = merged[(b * num_groups + k) * dim + index % dim];
}
