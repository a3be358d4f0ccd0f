// Labels: number the groups by their position in the sequence, in one launch; see
// basic/labels.cu. One block, one sequence.
//
// A block has GROUP_THREADS threads, or fewer for a short sequence. The launch bound of
// one block per SM lets it use all registers; otherwise the compiler would reserve some
// for a second block.

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    number_groups(const int* roots, long long batch, long long num_tokens,
                  long long first, int* positions, int* out) {
    __shared__ int scratch[32];
    const long long row = blockIdx.x * num_tokens;  // of (B, N)
    write_labels(roots + row, num_tokens, first, positions + 2 * row, scratch,
                 out + row);
}
