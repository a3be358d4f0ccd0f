// Labels: number the groups by their position in the sequence, in one launch; see
// basic/labels.cu. `write_labels` is in numbering.cuh. One block, one sequence.
//
// A block has GROUP_THREADS threads, or fewer for a short sequence. The launch bound of
// one block per multiprocessor lets the block use all registers; otherwise the compiler
// would reserve some registers for a second block.
// Shapes: roots and out (B, N), positions (B, 2N), which is scratch memory.

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    number_groups(const int* roots, long long batch, long long num_tokens,
                  long long by_first, int* positions, int* out) {
    __shared__ int scratch[32];
    const long long sequence_start = blockIdx.x * num_tokens;  // in (B, N)
    write_labels(roots + sequence_start, num_tokens, by_first,
                 positions + 2 * sequence_start, scratch, out + sequence_start);
}
