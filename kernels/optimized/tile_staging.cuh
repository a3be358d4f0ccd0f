// How rows of a matrix come to shared memory, STEP_BYTES of each at a time: in chunks
// of 16 bytes where all rows are aligned, which is the common case and takes few
// instructions, and in smaller pieces where they are not.

constexpr int STEP = STEP_BYTES / sizeof(real_t);  // elements of a row

// Rows of a matrix from a tile's first on; those from `count` on do not exist.
struct Rows {
    const real_t* data;
    long long count;
};

// Where the 16 bytes `chunk` of a staged row lie, in bytes from the stage's start.
// Turning the chunks with the row keeps eight rows that are read at once in different
// banks.
__device__ __forceinline__ int staged(int row, int chunk) {
    return row * STEP_BYTES + (chunk ^ row / 2 % 4) * 16;
}

// Stage STEP_BYTES of `rows_a` rows of A and `rows_b` of B from column k on, zeros for
// what does not exist. Copies are of `grain` bytes, which divides every row's address
// and length; 2 stands for what cannot be copied in the background.
template <int rows_a, int rows_b, int threads, int grain>
__device__ __forceinline__ void stage_pieces(unsigned char* stage, const Rows& a,
                                             const Rows& b, long long k, long long dim,
                                             long long stride) {
    constexpr int rows = threads / 4;  // at a time, a thread for a chunk
    const int chunk = threadIdx.x % 4;
    const long long column = k + chunk * WIDTH;
    const int rest = static_cast<int>(min(dim - column, (long long)WIDTH));
#pragma unroll 1  // rare: less code matters more
    for (int row = threadIdx.x / 4; row < rows_a + rows_b; row += rows) {
        const bool of_a = row < rows_a;
        const int own = of_a ? row : row - rows_a;
        const real_t* source = (of_a ? a.data : b.data) + own * stride + column;
        const int left = own < (of_a ? a.count : b.count) ? rest : 0;
        unsigned char* target = stage + staged(row, chunk);
        if constexpr (grain == 2) {
            *reinterpret_cast<Vector*>(target) = read_halfwords(source, left);
        } else {
            constexpr int each = grain / sizeof(real_t);
#pragma unroll
            for (int i = 0; i < WIDTH; i += each) {
                auto* piece = target + i * sizeof(real_t);
                if (i < left)
                    cp_async<grain>(piece, source + i);
                else
                    *reinterpret_cast<Word<grain>*>(piece) = Word<grain>{};
            }
        }
    }
}

// The same by the widest copies that fit, the same ones for a whole launch.
template <int rows_a, int rows_b, int threads>
__device__ __forceinline__ void stage_pieces(int grain, unsigned char* stage, Rows a,
                                             Rows b, long long k, long long dim,
                                             long long stride) {
    constexpr int word = sizeof(real_t) == 8 ? 8 : 4;
    constexpr int least = sizeof(real_t) == 2 ? 2 : 8;
    if (sizeof(real_t) == 8 || grain == 8)
        stage_pieces<rows_a, rows_b, threads, 8>(stage, a, b, k, dim, stride);
    else if (sizeof(real_t) == 4 || grain == 4)
        stage_pieces<rows_a, rows_b, threads, word>(stage, a, b, k, dim, stride);
    else
        stage_pieces<rows_a, rows_b, threads, least>(stage, a, b, k, dim, stride);
}

// The widest copy that divides the addresses of both matrices and of all their rows.
__device__ __forceinline__ int grain_of_both(const Rows& a, const Rows& b,
                                             long long lengths) {
    return grain_of(reinterpret_cast<unsigned long long>(a.data) |
                    reinterpret_cast<unsigned long long>(b.data) |
                    static_cast<unsigned long long>(lengths) * sizeof(real_t));
}

// Whether a matrix is staged as `Chunks`: whole chunks, aligned, and offsets within a
// tile that fit 32 bits.
__device__ __forceinline__ bool in_chunks(int grain, long long stride) {
    return grain == 16 && stride < 1 << 24;
}

// A thread's part of `num_rows` rows by `threads`: a chunk of every (threads / 4)-th
// row. A row that does not exist is another copy of the last one, whose sums have no
// use.
template <int num_rows, int threads>
struct Chunks {
    static constexpr int rows = threads / 4;  // at a time, a thread for a chunk
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

    // Begin to stage columns `column` onwards, or zeros behind the end of the rows.
    __device__ __forceinline__ void stage(unsigned char* target, int column,
                                          bool exists) const {
#pragma unroll
        for (int i = 0; i < num_rows / rows; ++i)
            cp_async_or_zeros<16>(target + i * rows * STEP_BYTES,
                                  data + column + offset[i], exists);
    }
};
