// Staging: copies of matrix rows to shared memory, where a tile is multiplied.
//
// A tile is multiplied in steps. A step covers the same STEP_BYTES (64) bytes of all
// rows of the tile: four chunks of 16 bytes of each row. A stage is the shared memory
// that holds one step. Four threads copy a row, one chunk each. The PTX instructions
// for the copies are in tensor_core.cuh.
//
// If all rows are 16-byte aligned, which is the common case, `Chunks` copies whole
// chunks in few instructions. Otherwise `copy_pieces` copies smaller pieces.

constexpr int STEP = STEP_BYTES / sizeof(real_t);  // elements of a row in a step

// The rows of a matrix from the first row of a tile on. Only `count` rows exist.
struct Rows {
    const real_t* data;
    long long count;
};

// Return the offset of a chunk of a row, in bytes from the start of the stage.
//
// `ldmatrix` reads the same chunk of eight consecutive rows at once, 128 bytes. Shared
// memory has 32 banks of 4 bytes, so 128 bytes are read without conflict only if they
// all lie in different banks. Two rows of 64 bytes fill the banks once: in row order,
// the chunks of rows 0, 2, 4 and 6 would lie in the same banks. The XOR permutes the
// four chunks within a row, differently for each pair of rows, so that the eight chunks
// lie in eight different groups of banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * STEP_BYTES + (chunk ^ row / 2 % 4) * 16;
}

// Copy one step, from column k on, to a stage: `rows_a` rows of A, then `rows_b` rows
// of B. Rows and columns that do not exist become zeros. Each copy has `alignment`
// bytes, which must divide the address and the length of every row. No asynchronous
// copy of 2 bytes exists, so with this alignment the elements go through registers.
template <int rows_a, int rows_b, int threads, int alignment>
__device__ __forceinline__ void copy_pieces(unsigned char* stage, const Rows& a,
                                            const Rows& b, long long k, long long dim,
                                            long long stride) {
    constexpr int rows_at_once = threads / 4;  // one thread for each chunk
    const int chunk = threadIdx.x % 4;
    const long long column = k + chunk * WIDTH;
    const int rest = static_cast<int>(min(dim - column, (long long)WIDTH));
#pragma unroll 1  // this path is rare, so the code is short, not fast
    for (int row = threadIdx.x / 4; row < rows_a + rows_b; row += rows_at_once) {
        const bool of_a = row < rows_a;
        const int matrix_row = of_a ? row : row - rows_a;
        const real_t* source = (of_a ? a.data : b.data) + matrix_row * stride + column;
        const int left = matrix_row < (of_a ? a.count : b.count) ? rest : 0;
        unsigned char* target = stage + chunk_offset(row, chunk);
        if constexpr (alignment == 2) {
            *reinterpret_cast<Vector*>(target) = read_halfwords(source, left);
        } else {
            constexpr int per_piece = alignment / sizeof(real_t);
#pragma unroll
            for (int i = 0; i < WIDTH; i += per_piece) {
                auto* piece = target + i * sizeof(real_t);
                if (i < left)
                    cp_async<alignment>(piece, source + i);
                else
                    *reinterpret_cast<Word<alignment>*>(piece) = Word<alignment>{};
            }
        }
    }
}

// Copy one step. An alignment of 8, 4 or 2 selects the function above with this
// alignment. An alignment of 16, which occurs here if the stride is 2^24 or more
// (`in_chunks`), selects the function with the size of one element. `alignment` is the
// same in the whole launch, so the branches do not diverge.
//
// All three calls are compiled for every type, also those that the type never executes.
// So the template argument must be legal for the type: a piece of 4 bytes is smaller
// than a double (`per_piece` would be 0), and 2 bytes are for 16-bit types only.
// `word_bytes` and `least_bytes` are 8 in these cases.
template <int rows_a, int rows_b, int threads>
__device__ __forceinline__ void copy_pieces(int alignment, unsigned char* stage, Rows a,
                                            Rows b, long long k, long long dim,
                                            long long stride) {
    constexpr int word_bytes = sizeof(real_t) == 8 ? 8 : 4;
    constexpr int least_bytes = sizeof(real_t) == 2 ? 2 : 8;
    if (sizeof(real_t) == 8 || alignment == 8)
        copy_pieces<rows_a, rows_b, threads, 8>(stage, a, b, k, dim, stride);
    else if (sizeof(real_t) == 4 || alignment == 4)
        copy_pieces<rows_a, rows_b, threads, word_bytes>(stage, a, b, k, dim, stride);
    else
        copy_pieces<rows_a, rows_b, threads, least_bytes>(stage, a, b, k, dim, stride);
}

// Return the widest alignment, up to 16 bytes, that all rows of both matrices have.
// `lengths` are the row lengths, combined by OR: a power of two divides all lengths if
// it divides their OR.
__device__ __forceinline__ int common_alignment(const Rows& a, const Rows& b,
                                                long long lengths) {
    return alignment_of(reinterpret_cast<unsigned long long>(a.data) |
                        reinterpret_cast<unsigned long long>(b.data) |
                        static_cast<unsigned long long>(lengths) * sizeof(real_t));
}

// Return whether `Chunks` can copy the rows: every chunk is whole and aligned, and
// offsets within a tile (256 rows or fewer) fit in 32 bits.
__device__ __forceinline__ bool in_chunks(int alignment, long long stride) {
    return alignment == 16 && stride < 1 << 24;
}

// The chunks that one thread copies of a tile of `num_rows` rows: one chunk of every
// (threads / 4)-th row. The offsets stay in registers for all steps. If a row does not
// exist, the last row is copied instead: the caller ignores the sums of that row.
template <int num_rows, int threads>
struct Chunks {
    static constexpr int rows_at_once = threads / 4;
    const real_t* data;
    unsigned offset[num_rows / rows_at_once];

    __device__ __forceinline__ Chunks(const Rows& from, long long stride)
        : data(from.data) {
        const int last_row = static_cast<int>(min(from.count, (long long)num_rows)) - 1;
#pragma unroll
        for (int i = 0; i < num_rows / rows_at_once; ++i) {
            const int row =
                min(static_cast<int>(threadIdx.x / 4) + i * rows_at_once, last_row);
            offset[i] = row * static_cast<unsigned>(stride) + threadIdx.x % 4 * WIDTH;
        }
    }

    // Start to copy one chunk of each row, from `column` on. `target` is the place of
    // the thread's first chunk: the stage plus chunk_offset(threadIdx.x / 4,
    // threadIdx.x % 4). The next chunks lie `rows_at_once` rows further. `rows_at_once`
    // is a multiple of 8, so the permutation of `chunk_offset` is the same for all of
    // them. `exists` says whether the chunk lies within the rows; otherwise, write
    // zeros.
    __device__ __forceinline__ void copy(unsigned char* target, int column,
                                         bool exists) const {
#pragma unroll
        for (int i = 0; i < num_rows / rows_at_once; ++i)
            cp_async_or_zeros<16>(target + i * rows_at_once * STEP_BYTES,
                                  data + column + offset[i], exists);
    }
};
