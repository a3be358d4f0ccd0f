// Groups: the number of members of each group, and the position of its last member.
// Labels (B, N) are 0 .. K-1, or -1 for padding. One thread, one output.

// The number of tokens with the label of the group.
// Shapes: labels (B, N), out (B, K).
extern "C" __global__ void group_sizes(const int* labels, long long batch,
                                       long long num_tokens, long long num_groups,
                                       int* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const int* sequence_labels = labels + index / num_groups * num_tokens;  // (N,)
    int size = 0;
    for (long long j = 0; j < num_tokens; ++j)
        size += sequence_labels[j] == index % num_groups;
    out[index] = size;
}

// The position of the last member of every group, or -1 for an empty group.
// Shapes: labels (B, N), out (B, K).
extern "C" __global__ void group_positions(const int* labels, long long batch,
                                           long long num_tokens, long long num_groups,
                                           int* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const int* sequence_labels = labels + index / num_groups * num_tokens;  // (N,)
    long long j = num_tokens - 1;
    while (j >= 0 && sequence_labels[j] != index % num_groups) --j;
    out[index] = static_cast<int>(j);
}
