// Tiles of S = A Bᵀ for A and B of shape (rows, dim), with sums in registers.
//
// The rows of both sides come to shared memory STEP_BYTES at a time; copies of the next
// steps are in flight while one is multiplied. A warp holds fragments of 32 x 64 sums,
// 4 x 16 in each thread, whether the tensor cores find them (16-bit types, and float
// where TF32 is allowed; sm_80 on) or the FMA units. Every shape of tile is made of the
// same fragments and adds in the same order, so it changes no bit of a result.

constexpr bool TENSOR_CORES = (sizeof(real_t) == 2 || TF32) && __CUDA_ARCH__ >= 800;
// Blocks that share the registers of an SM: TF32 takes more of them than 16 bits do.
constexpr int TILE_BLOCKS = TENSOR_CORES && !TF32 ? 2 : 1;

using Fragment = acc_t[4][16];

// A tile of `rows` by `columns`. Warps stand `across` columns of 64 wide, and each has
// `fragments` below one another.
template <int rows_, int columns_, int fragments_, int stages_>
struct Shape {
    static constexpr int rows = rows_, columns = columns_, fragments = fragments_;
    static constexpr int stages = stages_;
    static constexpr int across = columns / 64, down = rows / (32 * fragments);
    static constexpr int threads = across * down * 32;
    static constexpr int stage_bytes = (rows + columns) * STEP_BYTES;  // A's, then B's
    static constexpr int bytes = stages * stage_bytes;

    // The first row and column of a thread's warp.
    static __device__ __forceinline__ int warp_row() {
        return threadIdx.x / 32 / across * (32 * fragments);
    }
    static __device__ __forceinline__ int warp_column() {
        return threadIdx.x / 32 % across * 64;
    }
    // Where a thread's i-th row and j-th column lie in the tile. A fragment has 4 rows.
    static __device__ __forceinline__ int row(int i) {
        return warp_row() + i * 8 + threadIdx.x % 32 / 4;
    }
    static __device__ __forceinline__ int column(int j) {
        return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
    }
};
using Whole = Shape<TILE, TILE, 1, 3>;
using Half = Shape<TILE / 2, TILE, 1, 4>;  // where few blocks run
// For tensor cores alone, one block on an SM: reads a quarter less.
using Wide = Shape<TILE, 2 * TILE, 2, WIDE_STAGES>;
// As the launchers have it (qm_cupy/cuda/tiles.py).
static_assert(Whole::threads == BLOCK_THREADS && Half::threads == BLOCK_THREADS / 2 &&
              Wide::threads == BLOCK_THREADS);

// sums += the products of one step of A's rows and B's, on the tensor cores.
template <class Tile>
__device__ __forceinline__ void multiply_mma(const unsigned char* rows,
                                             const unsigned char* columns,
                                             Fragment (&sums)[Tile::fragments]) {
    const int lane = threadIdx.x % 32;
    // The chunk of the step's first half that the lane gives to `ldmatrix_x4`, in bytes
    // from the first row; what is added to a row below is a multiple of 8 and turns no
    // chunk, and the second half's chunk is 2 further, which flips a bit.
    const int a0 = staged(Tile::warp_row() + lane % 16, lane / 16);
    const int b0 = staged(Tile::warp_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the step: 32 bytes of each row
        const unsigned char* from_a = rows + (a0 ^ half * 32);
        const unsigned char* from_b = columns + (b0 ^ half * 32);
        unsigned a[2 * Tile::fragments][4];
#pragma unroll
        for (int m = 0; m < 2 * Tile::fragments; ++m)
            ldmatrix_x4(a[m], from_a + m * 16 * STEP_BYTES);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {  // two 8-column strips to a load
            unsigned b[4];
            ldmatrix_x4(b, from_b + n * 8 * STEP_BYTES);
            const unsigned strips[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
            for (int m = 0; m < 2 * Tile::fragments; ++m)
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    auto& upper = sums[m / 2][m % 2 * 2];  // 8 rows, and 8 below
                    auto& lower = sums[m / 2][m % 2 * 2 + 1];
                    const int j = 2 * (n + s);
                    mma_16x8(upper[j], upper[j + 1], lower[j], lower[j + 1], a[m],
                             strips[s], real_t());
                }
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
template <class Tile>
__device__ __forceinline__ void multiply_fma(const unsigned char* rows,
                                             const unsigned char* columns,
                                             Fragment (&sums)[1]) {
    for (int chunk = 0; chunk < 4; ++chunk) {
        acc_t a[4][WIDTH], b[WIDTH];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            load_staged(a[i], rows + staged(Tile::row(i), chunk));
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            load_staged(b, columns + staged(Tile::column(j), chunk));
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) sums[0][i][j] += a[i][k] * b[k];
        }
    }
}

template <class Tile, bool tensor_cores>
__device__ __forceinline__ void multiply(const unsigned char* rows,
                                         const unsigned char* columns,
                                         Fragment (&sums)[Tile::fragments]) {
    if constexpr (tensor_cores)
        multiply_mma<Tile>(rows, columns, sums);
    else
        multiply_fma<Tile>(rows, columns, sums);
}

template <int fragments>
__device__ __forceinline__ void clear(Fragment (&sums)[fragments]) {
#pragma unroll
    for (int f = 0; f < fragments; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j) sums[f][i][j] = 0;
}

// The steps of tiles 0, 1, ...: stage(to, tile, step) begins to bring one, others are
// multiplied meanwhile, and use(tile) follows the last of a tile.
template <class Tile, bool tensor_cores, class Stage, class Use>
__device__ __forceinline__ void multiply_steps(unsigned char* stages, int num_tiles,
                                               int steps_per_tile,
                                               Fragment (&sums)[Tile::fragments],
                                               Stage stage, Use use) {
    // To be staged. Unsigned, so that of one tile the compiler sees that none follows.
    unsigned next_tile = 0;
    int next_step = 0;
    const auto stage_next = [&](int slot) {
        if (next_tile < static_cast<unsigned>(num_tiles)) {
            stage(stages + slot * Tile::stage_bytes, next_tile, next_step);
            if (++next_step == steps_per_tile) next_step = 0, ++next_tile;
        }
        cp_async_commit();
    };
    for (int slot = 0; slot < Tile::stages - 1; ++slot) stage_next(slot);

    int slot = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
        clear(sums);
        for (int step = 0; step < steps_per_tile; ++step) {
            cp_async_wait<Tile::stages - 2>();
            __syncthreads();  // this step is there, and the one before it is used up
            stage_next(slot == 0 ? Tile::stages - 1 : slot - 1);
            const unsigned char* rows = stages + slot * Tile::stage_bytes;
            multiply<Tile, tensor_cores>(rows, rows + Tile::rows * STEP_BYTES, sums);
            slot = slot == Tile::stages - 1 ? 0 : slot + 1;
        }
        use(tile);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// For tile 0, 1, ... of B's rows: find the sums with A's tile, then call use(tile).
// `stages` (Tile::bytes, shared) is free again at the end. The rows' first `dim`
// elements are read, and they lie `stride` apart.
template <class Tile, bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim, long long stride,
                                               Fragment (&sums)[Tile::fragments],
                                               Use use) {
    constexpr int threads = Tile::threads;
    const int steps_per_tile = static_cast<int>((dim + STEP - 1) / STEP);
    const int grain = grain_of_both(a, b, stride | dim);
    const auto rows_from = [&](unsigned tile) {
        const long long first = static_cast<long long>(tile) * Tile::columns;
        return Rows{b.data + first * stride, b.count - first};
    };
    // Two loops, because a call within one takes registers from it.
    if (in_chunks(grain, stride)) {
        const Chunks<Tile::rows, threads> of_a(a, stride);
        Chunks<Tile::columns, threads> of_b(b, stride);
        const int target = staged(threadIdx.x / 4, threadIdx.x % 4);
        const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
        const auto stage = [&](unsigned char* to, unsigned tile, int step) {
            const int column = step * STEP;
            if (step == 0 && tile > 0)
                of_b = Chunks<Tile::columns, threads>(rows_from(tile), stride);
            to += target;
            of_a.stage(to, column, column < rest);
            of_b.stage(to + Tile::rows * STEP_BYTES, column, column < rest);
        };
        multiply_steps<Tile, tensor_cores>(stages, num_tiles, steps_per_tile, sums,
                                           stage, use);
    } else {
        const auto stage = [&](unsigned char* to, unsigned tile, int step) {
            stage_pieces<Tile::rows, Tile::columns, threads>(
                grain, to, a, rows_from(tile), step * STEP, dim, stride);
        };
        multiply_steps<Tile, tensor_cores>(stages, num_tiles, steps_per_tile, sums,
                                           stage, use);
    }
}

// The same for rows without gaps.
template <class Tile, bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim,
                                               Fragment (&sums)[Tile::fragments],
                                               Use use) {
    multiply_tiles<Tile, tensor_cores>(stages, a, b, num_tiles, dim, dim, sums, use);
}

// Stage all steps of rows without gaps, one step behind the other.
template <int num_rows, int threads>
__device__ __noinline__ void stage_all(int grain, unsigned char* to, Rows rows,
                                       long long dim) {
    for (long long k = 0; k < dim; k += STEP, to += num_rows * STEP_BYTES)
        stage_pieces<num_rows, 0, threads>(grain, to, rows, rows, k, dim, dim);
}

// As `multiply_tiles`, for rows so short that A's tile stays in shared memory, and each
// of B's is there as a whole while the next one is on its way: `shared` holds A's and
// two of B's, rows in whole steps.
template <class Tile, class Use>
__device__ __forceinline__ void multiply_kept(unsigned char* shared, const Rows& a,
                                              const Rows& b, int num_tiles,
                                              long long dim,
                                              Fragment (&sums)[Tile::fragments],
                                              Use use) {
    static_assert(Tile::rows == Tile::columns);
    constexpr int step_bytes = Tile::rows * STEP_BYTES;
    const int tile_bytes = static_cast<int>((dim + STEP - 1) / STEP) * step_bytes;
    const bool chunks = in_chunks(grain_of_both(a, b, dim), dim);
    const auto stage = [&](int at, const Rows& rows) {
        if (chunks) {
            const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
            const Chunks<Tile::rows, Tile::threads> part(rows, dim);
            unsigned char* to = shared + at + staged(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll 1
            for (int k = 0; k < dim; k += STEP, to += step_bytes)
                part.stage(to, k, k < rest);
        } else {
            stage_all<Tile::rows, Tile::threads>(grain_of_both(a, b, dim), shared + at,
                                                 rows, dim);
        }
    };
    stage(0, a);
    stage(tile_bytes, b);
    int now = tile_bytes, next = 2 * tile_bytes;  // where B's tiles are, in turns
    for (int tile = 0; tile < num_tiles; ++tile) {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and the one before it is used up
        if (tile + 1 < num_tiles) {
            const long long first = static_cast<long long>(tile + 1) * Tile::columns;
            stage(next, {b.data + first * dim, b.count - first});
        }
        clear(sums);
#pragma unroll 1
        for (int at = 0; at < tile_bytes; at += step_bytes)
            multiply<Tile, TENSOR_CORES>(shared + at, shared + now + at, sums);
        use(tile);
        next = now;
        now = 3 * tile_bytes - now;
    }
    __syncthreads();
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

// Where a tile of a symmetric product lies: its first row and column. An N x N matrix
// of a sequence has fewer than 2^31 rows, and a launch has fewer than 2^31 blocks.
struct Corner {
    int row, column;
};

// The index-th tile that reaches the diagonal or the half above it. The matrix is cut
// into squares as wide as a tile, and these from above into tiles. Of the last ones a
// tile may have no row at all.
template <class Tile>
__device__ __forceinline__ Corner upper_tile(unsigned index, unsigned num_squares) {
    constexpr unsigned parts = Tile::columns / Tile::rows;
    const unsigned part = index % parts;
    unsigned i = 0, j = index / parts;
    for (; j >= num_squares - i; ++i) j -= num_squares - i;
    return {static_cast<int>(i * Tile::columns + part * Tile::rows),
            static_cast<int>((i + j) * Tile::columns)};
}
