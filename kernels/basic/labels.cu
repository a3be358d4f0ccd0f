// Labels: groups numbered by the order of the sequence.
//
// A token's root is any number within 0 .. 2N-1 that its group shares and no other has;
// -1, or any other, is padding. A group stands where its last member does (or its
// first), and label = the number of groups that stand before it.
//
// One thread, one output.

// Whether a group stands at this token.
extern "C" __global__ void group_ends(const int* roots, long long batch,
                                      long long num_tokens, long long first,
                                      bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long row = index - index % num_tokens;
    const int root = group_of(roots[index], 2 * num_tokens);
    const long long step = first ? -1 : 1;
    bool end = root >= 0;
    for (long long j = index + step; row <= j && j < row + num_tokens; j += step)
        end = end && roots[j] != root;
    out[index] = end;
}

extern "C" __global__ void number_groups(const int* roots, const bool* ends,
                                         long long batch, long long num_tokens,
                                         int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long row = index - index % num_tokens;
    const int root = group_of(roots[index], 2 * num_tokens);
    int label = 0;
    for (long long j = row; j < row + num_tokens && root >= 0; ++j) {
        if (ends[j] && roots[j] == root) break;
        label += ends[j];
    }
    out[index] = root < 0 ? -1 : label;
}
