// Staging: copying rows of a matrix to shared memory, where a tile is multiplied.
//
// A tile is multiplied in steps. A step covers the same STEP_BYTES (64) bytes of all
// its rows, four chunks of 16 bytes of each row. A stage is the shared memory that
// holds one step. Four threads copy a row, one chunk each.
//
// If all rows are 16-byte aligned, which is the common case, `Chunks` copies whole
// chunks in few instructions. Otherwise `stage_pieces` copies smaller pieces.

constexpr int STEP = STEP_BYTES / sizeof(real_t);  // elements of a row in a step

// The rows of a matrix from the first row of a tile on. Only `count` of them exist.
struct Rows {
    const real_t* data;
    long long count;
};

// Return where a chunk of a staged row lies, in bytes from the start of the stage.
//
// `ldmatrix` reads the same chunk of eight consecutive rows at once, 128 bytes. Shared
// memory has 32 banks of 4 bytes, so 128 bytes are read without conflict only if they
// all lie in different banks. Two rows of 64 bytes fill the banks once: in row order,
// the chunks of rows 0, 2, 4 and 6 would lie in the same banks. The XOR permutes the
// four chunks within a row, differently for each pair of rows, so that the eight chunks
// lie in eight different groups of banks.
__device__ __forceinline__ int staged(int row, int chunk) {
    return row * STEP_BYTES + (chunk ^ row / 2 % 4) * 16;
}

// Stage one step, from column k on: `rows_a` rows of A, then `rows_b` rows of B. Rows
// and columns that do not exist become zeros. Each copy has `alignment` bytes, which
// must divide the address and the length of every row. At 2 bytes no asynchronous copy
// is possible, so the elements go through registers.
template <int rows_a, int rows_b, int threads, int alignment>
__device__ __forceinline__ void stage_pieces(unsigned char* stage, const Rows& a,
                                             const Rows& b, long long k, long long dim,
                                             long long stride) {
    constexpr int rows = threads / 4;  // rows at a time, one thread for each chunk
    const int chunk = threadIdx.x % 4;
    const long long column = k + chunk * WIDTH;
    const int rest = static_cast<int>(min(dim - column, (long long)WIDTH));
#pragma unroll 1  // this path is rare: short code matters more than speed
    for (int row = threadIdx.x / 4; row < rows_a + rows_b; row += rows) {
        const bool of_a = row < rows_a;
        const int own = of_a ? row : row - rows_a;
        const real_t* source = (of_a ? a.data : b.data) + own * stride + column;
        const int left = own < (of_a ? a.count : b.count) ? rest : 0;
        unsigned char* target = stage + staged(row, chunk);
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

// Stage one step with the widest copies that `alignment` permits. `alignment` is the
// same in the whole launch, so the branches do not diverge.
template <int rows_a, int rows_b, int threads>
__device__ __forceinline__ void stage_pieces(int alignment, unsigned char* stage,
                                             Rows a, Rows b, long long k, long long dim,
                                             long long stride) {
    constexpr int word = sizeof(real_t) == 8 ? 8 : 4;
    constexpr int least = sizeof(real_t) == 2 ? 2 : 8;
    if (sizeof(real_t) == 8 || alignment == 8)
        stage_pieces<rows_a, rows_b, threads, 8>(stage, a, b, k, dim, stride);
    else if (sizeof(real_t) == 4 || alignment == 4)
        stage_pieces<rows_a, rows_b, threads, word>(stage, a, b, k, dim, stride);
    else
        stage_pieces<rows_a, rows_b, threads, least>(stage, a, b, k, dim, stride);
}

// Return the widest alignment, up to 16 bytes, that all rows of both matrices have.
// `lengths` are the row lengths, combined by OR: a power of two divides all of them if
// it divides their OR.
__device__ __forceinline__ int common_alignment(const Rows& a, const Rows& b,
                                                long long lengths) {
    return alignment_of(reinterpret_cast<unsigned long long>(a.data) |
                        reinterpret_cast<unsigned long long>(b.data) |
                        static_cast<unsigned long long>(lengths) * sizeof(real_t));
}

// Return whether rows can be staged by `Chunks`: every chunk is whole and aligned, and
// offsets within a tile fit in 32 bits.
__device__ __forceinline__ bool in_chunks(int alignment, long long stride) {
    return alignment == 16 && stride < 1 << 24;
}

// The chunks that one thread stages of a tile of `num_rows` rows: one chunk of every
// (threads / 4)-th row. The offsets stay in registers for all steps. In place of a row
// that does not exist, the last row is copied again: the caller ignores its sums.
template <int num_rows, int threads>
struct Chunks {
    static constexpr int rows = threads / 4;  // rows at a time
    const real_t* data;
    unsigned offset[num_rows / rows];

    __device__ __forceinline__ Chunks(const Rows& from, long long stride)
        : data(from.data) {
        const int last = static_cast<int>(min(from.count, (long long)num_rows)) - 1;
#pragma unroll
        for (int i = 0; i < num_rows / rows; ++i) {
            const int row = min(static_cast<int>(threadIdx.x / 4) + i * rows, last);
            offset[i] = row * static_cast<unsigned>(stride) + threadIdx.x % 4 * WIDTH;
        }
    }

    // Start to copy one chunk of each row from `column` on. If it does not exist,
    // because it lies past the end of the rows, write zeros.
    __device__ __forceinline__ void stage(unsigned char* target, int column,
                                          bool exists) const {
#pragma unroll
        for (int i = 0; i < num_rows / rows; ++i)
            cp_async_or_zeros<16>(target + i * rows * STEP_BYTES,
                                  data + column + offset[i], exists);
    }
};
