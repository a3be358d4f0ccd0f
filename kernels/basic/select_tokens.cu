// Selection: the K tokens with the highest scores. `top_tokens` marks them, and
// `select_tokens` lists their positions. One thread, one output.

// True for the K highest scores of a sequence. A score is among them if fewer than K
// others are better; of two equal scores, the one with the lower index is better. A
// score of -infinity is padding and is never selected. `ordered_bits` and `padding` are
// in common.cuh.
// Shapes: scores and out (B, N), counts (B,).
extern "C" __global__ void top_tokens(const acc_t* scores, const int* counts,
                                      long long batch, long long num_tokens,
                                      long long num_groups, bool* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const acc_t* sequence_scores = scores + b * num_tokens;  // (N,)
    const bits_t own_bits = ordered_bits(sequence_scores[i]);
    long long better = 0;
    for (long long j = 0; j < num_tokens; ++j) {
        const bits_t other_bits = ordered_bits(sequence_scores[j]);
        better += other_bits > own_bits || (other_bits == own_bits && j < i);
    }
    out[index] =
        sequence_scores[i] != padding() && better < count_of(counts, b, num_groups);
}

// The positions of the selected tokens, ascending; -1 if there are fewer than K.
// Shapes: selected (B, N) from `top_tokens`, out (B, K).
extern "C" __global__ void select_tokens(const bool* selected, long long batch,
                                         long long num_tokens, long long num_groups,
                                         int* out) {
    const long long index = thread_index();  // (B, K)
    if (index >= batch * num_groups) return;
    const bool* sequence_selected = selected + index / num_groups * num_tokens;  // (N,)
    long long to_skip = index % num_groups;  // k others come before the k-th
    int position = -1;
    for (long long i = 0; i < num_tokens && position < 0; ++i)
        if (sequence_selected[i] && to_skip-- == 0) position = static_cast<int>(i);
    out[index] = position;
}
