// Labels: number the groups by their order in the sequence.
//
// Every token has a root: a number within 0 .. 2N-1 that is the same for all members of
// a group and different in every other group. Some callers use numbers from N on for
// nodes of a dendrogram or for protected tokens. -1, or any other number, means
// padding.
// The position of a group is that of its last member, or of its first member if
// `by_first`.
//
//   label = the number of groups whose position comes before that of the token's group
//
// One thread, one output.

// True where a group has its position: at the last (or first) token with its root.
// Shapes: roots and out (B, N).
extern "C" __global__ void group_ends(const int* roots, long long batch,
                                      long long num_tokens, long long by_first,
                                      bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long sequence_start = index - index % num_tokens;
    const int root = group_of(roots[index], 2 * num_tokens);
    const long long step = by_first ? -1 : 1;
    bool is_end = root >= 0;
    for (long long j = index + step;
         sequence_start <= j && j < sequence_start + num_tokens; j += step)
        is_end = is_end && roots[j] != root;
    out[index] = is_end;
}

// The label of every token: count the groups whose position comes before that of its
// own group.
// Shapes: roots, ends (from `group_ends`) and out (B, N).
extern "C" __global__ void number_groups(const int* roots, const bool* ends,
                                         long long batch, long long num_tokens,
                                         int* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long sequence_start = index - index % num_tokens;
    const int root = group_of(roots[index], 2 * num_tokens);
    int label = 0;
    for (long long j = sequence_start; j < sequence_start + num_tokens && root >= 0;
         ++j) {
        if (ends[j] && roots[j] == root) break;
        label += ends[j];
    }
    out[index] = root < 0 ? -1 : label;
}
