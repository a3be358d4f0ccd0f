// Labels: groups numbered by the order of the sequence, in one launch; see
// basic/labels.cu. One block, one sequence.
//
// A block has GROUP_THREADS, or fewer for a short sequence. One block may have all the
// registers there are: left to itself the compiler spares some for a second one.

extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 1)
    number_groups(const int* roots, long long batch, long long num_tokens,
                  long long first, int* places, int* out) {
    __shared__ int scratch[32];
    const long long row = blockIdx.x * num_tokens;  // of (B, N)
    number(roots + row, num_tokens, first, places + 2 * row, scratch, out + row);
}
