// Tiles of S = A Bᵀ, 128 x 128 at a time, for A and B of shape (rows, dim).
//
// 256 threads. The rows of both tiles come to shared memory 64 bytes at a time, with
// two such steps in flight ahead of the one being multiplied. Of the 128 x 128 sums
// each thread holds 4 x 16, the same ones whether the tensor cores find them (16-bit
// types, and float where TF32 is allowed; sm_80 on) or the FMA units: warp w has rows
// w / 2 * 32 and columns w % 2 * 64 onwards.

constexpr int TILE_THREADS = BLOCK_THREADS;
constexpr int STAGES = 3;
constexpr int STEP_BYTES = 64;  // of each row
constexpr int STEP = STEP_BYTES / sizeof(real_t);
constexpr int STAGE_BYTES = 2 * TILE * STEP_BYTES;  // A's rows, then B's: 16 KB
constexpr bool TENSOR_CORES = (sizeof(real_t) == 2 || TF32) && __CUDA_ARCH__ >= 800;
// Blocks that share the registers of an SM: TF32 takes more of them than 16 bits do.
constexpr int TILE_BLOCKS = TENSOR_CORES && !TF32 ? 2 : 1;

// Rows of a matrix from a tile's first on; those from `count` on do not exist.
struct Rows {
    const real_t* data;
    long long count;
};

// Where a thread's i-th row and j-th column lie in the tile.
__device__ __forceinline__ int tile_row(int i) {
    return threadIdx.x / 64 * 32 + i * 8 + threadIdx.x % 32 / 4;
}
__device__ __forceinline__ int tile_column(int j) {
    return threadIdx.x / 32 % 2 * 64 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
}

// Where the 16 bytes `chunk` of a staged row lie, in bytes from the stage's start.
// Turning the chunks with the row keeps eight rows that are read at once in different
// banks.
__device__ __forceinline__ int staged(int row, int chunk) {
    return row * STEP_BYTES + (chunk ^ row / 2 % 4) * 16;
}

// Stage STEP_BYTES of all rows from column k on, zeros for what does not exist. Copies
// are of `grain` bytes, which divides every row's address and length; 2 stands for what
// cannot be copied in the background.
template <int grain>
__device__ __forceinline__ void stage_step(unsigned char* stage, const Rows& a,
                                           const Rows& b, long long k, long long dim,
                                           long long stride) {
    constexpr int rows = TILE_THREADS / 4;  // at a time, a thread for a chunk
    const int chunk = threadIdx.x % 4;
    const long long column = k + chunk * WIDTH;
    const int rest = static_cast<int>(min(dim - column, (long long)WIDTH));
#pragma unroll
    for (int first = 0; first < 2 * TILE; first += rows) {  // B's from TILE on
        const Rows& from = first < TILE ? a : b;
        const int row = first % TILE + threadIdx.x / 4;
        const real_t* source = from.data + row * stride + column;
        const int left = row < from.count ? rest : 0;
        unsigned char* target = stage + staged(first / TILE * TILE + row, chunk);
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
__device__ __forceinline__ void stage_step(int grain, unsigned char* stage,
                                           const Rows& a, const Rows& b, long long k,
                                           long long dim, long long stride) {
    if (sizeof(real_t) == 8 || grain == 8)
        stage_step<8>(stage, a, b, k, dim, stride);
    else if (sizeof(real_t) == 4 || grain == 4)
        stage_step<sizeof(real_t) == 8 ? 8 : 4>(stage, a, b, k, dim, stride);
    else
        stage_step<sizeof(real_t) == 2 ? 2 : 8>(stage, a, b, k, dim, stride);
}

// Whether a matrix is staged as `Chunks`: whole chunks, aligned, and offsets within a
// tile that fit 32 bits.
__device__ __forceinline__ bool in_chunks(int grain, long long stride) {
    return grain == 16 && stride < 1 << 24;
}

// A thread's part of such a tile: one chunk of the rows `threadIdx.x / 4` and 64
// further. A row that does not exist is another copy of the last one, whose sums have
// no use.
struct Chunks {
    const real_t* data;
    unsigned offset[2];

    __device__ __forceinline__ Chunks(const Rows& rows, long long stride)
        : data(rows.data) {
        const int last = static_cast<int>(min(rows.count, (long long)TILE)) - 1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row =
                min(static_cast<int>(threadIdx.x / 4) + i * (TILE / 2), last);
            offset[i] = row * static_cast<unsigned>(stride) + threadIdx.x % 4 * WIDTH;
        }
    }

    // Begin to stage columns `column` onwards, or zeros behind the end of the rows.
    __device__ __forceinline__ void stage(unsigned char* target, int column,
                                          bool exists) const {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            cp_async_or_zeros<16>(target + i * (TILE / 2) * STEP_BYTES,
                                  data + column + offset[i], exists);
    }
};

// sums += the products of one step, on the tensor cores.
template <class T>
__device__ __forceinline__ void multiply_mma(unsigned char* stage,
                                             acc_t (&sums)[4][16]) {
    const int lane = threadIdx.x % 32;
    // The chunk of the step's first half that the lane gives to `ldmatrix_x4`, in bytes
    // from the stage's start; what is added to a row below is a multiple of 8 and turns
    // no chunk, and the second half's chunk is 2 further, which flips a bit.
    const int a0 = staged(threadIdx.x / 64 * 32 + lane % 16, lane / 16);
    const int b0 = staged(TILE + threadIdx.x / 32 % 2 * 64 + lane / 16 * 8 + lane % 8,
                          lane / 8 % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the step: 32 bytes of each row
        const unsigned char* from_a = stage + (a0 ^ half * 32);
        const unsigned char* from_b = stage + (b0 ^ half * 32);
        unsigned a[2][4];
        for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], from_a + m * 16 * STEP_BYTES);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {  // two 8-column strips to a load
            unsigned b[4];
            ldmatrix_x4(b, from_b + n * 8 * STEP_BYTES);
            const unsigned strips[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
            for (int m = 0; m < 2; ++m)
                for (int s = 0; s < 2; ++s)
                    mma_16x8(sums[2 * m][2 * (n + s)], sums[2 * m][2 * (n + s) + 1],
                             sums[2 * m + 1][2 * (n + s)],
                             sums[2 * m + 1][2 * (n + s) + 1], a[m], strips[s], T());
        }
    }
}

// One staged chunk, which is always whole and aligned.
__device__ __forceinline__ void load_staged(acc_t (&x)[WIDTH],
                                            const unsigned char* chunk) {
    const Vector v = *reinterpret_cast<const Vector*>(chunk);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = widen(v.element[i]);
}

// The same by fused multiply-adds.
__device__ __forceinline__ void multiply_fma(unsigned char* stage,
                                             acc_t (&sums)[4][16]) {
    for (int chunk = 0; chunk < 4; ++chunk) {
        acc_t a[4][WIDTH], b[WIDTH];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            load_staged(a[i], stage + staged(tile_row(i), chunk));
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            load_staged(b, stage + staged(TILE + tile_column(j), chunk));
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) sums[i][j] += a[i][k] * b[k];
        }
    }
}

template <class T, bool tensor_cores>
__device__ __forceinline__ void multiply(unsigned char* stage, acc_t (&sums)[4][16]) {
    if constexpr (tensor_cores)
        multiply_mma<T>(stage, sums);
    else
        multiply_fma(stage, sums);
}

// For tile 0, 1, ... of B's rows: find the sums with A's tile, then call use(tile).
// `stages` (STAGES * STAGE_BYTES, shared) is free again at the end. The rows' first
// `dim` elements are read, and they lie `stride` apart.
template <bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim, long long stride,
                                               acc_t (&sums)[4][16], Use use) {
    const int steps_per_tile = static_cast<int>((dim + STEP - 1) / STEP);
    const int grain =
        grain_of(reinterpret_cast<unsigned long long>(a.data) |
                 reinterpret_cast<unsigned long long>(b.data) |
                 static_cast<unsigned long long>(stride | dim) * sizeof(real_t));
    const auto rows_from = [&](unsigned tile) {
        const long long first = static_cast<long long>(tile) * TILE;
        return Rows{b.data + first * stride, b.count - first};
    };
    const bool chunks = in_chunks(grain, stride);
    const Chunks of_a(a, stride);
    Chunks of_b(b, stride);
    const int target = staged(threadIdx.x / 4, threadIdx.x % 4);
    const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
    // To be staged. Unsigned, so that of one tile the compiler sees that none follows.
    unsigned next_tile = 0;
    int next_step = 0;
    const auto stage_next = [&](int slot) {
        if (next_tile < static_cast<unsigned>(num_tiles)) {
            unsigned char* stage = stages + slot * STAGE_BYTES;
            const int column = next_step * STEP;
            if (chunks) {
                of_a.stage(stage + target, column, column < rest);
                of_b.stage(stage + TILE * STEP_BYTES + target, column, column < rest);
            } else {
                stage_step(grain, stage, a, rows_from(next_tile), column, dim, stride);
            }
            if (++next_step == steps_per_tile) {
                next_step = 0, ++next_tile;
                if (next_tile < static_cast<unsigned>(num_tiles))
                    of_b = Chunks(rows_from(next_tile), stride);
            }
        }
        cp_async_commit();
    };
    for (int slot = 0; slot < STAGES - 1; ++slot) stage_next(slot);

    int slot = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 16; ++j) sums[i][j] = 0;
        for (int step = 0; step < steps_per_tile; ++step) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // this step is there, and the one before it is used up
            stage_next(slot == 0 ? STAGES - 1 : slot - 1);
            multiply<real_t, tensor_cores>(stages + slot * STAGE_BYTES, sums);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        use(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// The same for rows without gaps.
template <bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim, acc_t (&sums)[4][16],
                                               Use use) {
    multiply_tiles<tensor_cores>(stages, a, b, num_tiles, dim, dim, sums, use);
}

// Bit i: the thread's i-th row (or column) of the tile from `first` on is a token.
template <int count, class Place>
__device__ __forceinline__ unsigned tokens_among(const bool* mask, long long first,
                                                 long long num_tokens, Place place) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const long long token = first + place(i);
        bits |= unsigned(token < num_tokens && is_token(mask, token)) << i;
    }
    return bits;
}

// Tile (i, j) with i <= j, the index-th of the upper ones row by row.
__device__ __forceinline__ void upper_tile(long long index, long long num_tiles,
                                           long long* i, long long* j) {
    for (*i = 0; index >= num_tiles - *i; ++*i) index -= num_tiles - *i;
    *j = *i + index;
}
