// Tiles of a matrix product: S = A Bᵀ for A and B of shape (rows, dim). A block
// computes one tile of S at a time and keeps its sums in registers.
//
// Steps. Each step copies STEP_BYTES of every row of A and B to a stage in shared
// memory (tile_staging.cuh) and adds their products to the sums. There are several
// stages: while one step is multiplied, the copies of the next ones are in flight. This
// hides the latency of global memory.
//
// Fragments. A tile is divided into fragments of 32 x 64 sums. A warp computes one
// fragment or two, and each of its threads holds 4 rows x 16 columns of a fragment. The
// layout is that of the tensor cores' results, which compute 16-bit types, and float
// where TF32 is allowed, from sm_80 on. Otherwise ordinary fused multiply-adds (FMA)
// compute the same layout.
//
// Bits. Every shape of tile consists of the same fragments and adds the products in the
// same order. Which shape runs therefore does not change a bit of a result.

constexpr bool TENSOR_CORES = (sizeof(real_t) == 2 || TF32) && __CUDA_ARCH__ >= 800;
// Blocks that fit the registers of one SM at a time: TF32 needs more registers than the
// 16-bit types do.
constexpr int TILE_BLOCKS = TENSOR_CORES && !TF32 ? 2 : 1;

using Fragment = acc_t[4][16];  // a thread's part: 4 rows, 16 columns

// A tile of `rows` x `columns` and how the warps of a block divide it. There are
// `across` warps side by side, each 64 columns wide, and `down` warps one below the
// other, each with `fragments` fragments of 32 rows.
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
    // The thread's i-th row and j-th column in the tile; a fragment has 4 and 16. Lane
    // l has the rows l / 4, l / 4 + 8, ... and two neighbouring columns of every eight.
    static __device__ __forceinline__ int row(int i) {
        return warp_row() + i * 8 + threadIdx.x % 32 / 4;
    }
    static __device__ __forceinline__ int column(int j) {
        return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
    }
};
using Whole = Shape<TILE, TILE, 1, 3>;
using Half = Shape<TILE / 2, TILE, 1, 4>;  // for small inputs: more, smaller tiles
// For tensor cores only, one block on an SM. It reads 3/4 of the bytes that two `Whole`
// tiles of the same area read.
using Wide = Shape<TILE, 2 * TILE, 2, WIDE_STAGES>;
// The launchers assume these sizes (qm_cupy/cuda/tiles.py).
static_assert(Whole::threads == BLOCK_THREADS && Half::threads == BLOCK_THREADS / 2 &&
              Wide::threads == BLOCK_THREADS);

// sums += the products of one step, on the tensor cores. `rows` is the staged step of
// A, `columns` that of B: the rows of B are the columns of S.
template <class Tile>
__device__ __forceinline__ void multiply_mma(const unsigned char* rows,
                                             const unsigned char* columns,
                                             Fragment (&sums)[Tile::fragments]) {
    const int lane = threadIdx.x % 32;
    // Each lane passes one chunk to `ldmatrix_x4`. These are the offsets for the first
    // half of the step, and the other addresses follow from them. Going down 8, 16, ...
    // rows only adds to the offset, because the permutation of chunks in `staged`
    // repeats every 8 rows. The second half lies 2 chunks further, which flips the bit
    // of value 32.
    const int a0 = staged(Tile::warp_row() + lane % 16, lane / 16);
    const int b0 = staged(Tile::warp_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 bytes of each row
        const unsigned char* from_a = rows + (a0 ^ half * 32);
        const unsigned char* from_b = columns + (b0 ^ half * 32);
        unsigned a[2 * Tile::fragments][4];
#pragma unroll
        for (int m = 0; m < 2 * Tile::fragments; ++m)
            ldmatrix_x4(a[m], from_a + m * 16 * STEP_BYTES);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {  // one load gives two strips of 8 columns
            unsigned b[4];
            ldmatrix_x4(b, from_b + n * 8 * STEP_BYTES);
            const unsigned strips[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
            for (int m = 0; m < 2 * Tile::fragments; ++m)
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    auto& upper = sums[m / 2][m % 2 * 2];  // 8 rows, and the next 8
                    auto& lower = sums[m / 2][m % 2 * 2 + 1];
                    const int j = 2 * (n + s);
                    mma_16x8(upper[j], upper[j + 1], lower[j], lower[j + 1], a[m],
                             strips[s], real_t());
                }
        }
    }
}

// Load a staged chunk, which is always whole and aligned.
__device__ __forceinline__ void load_staged(acc_t (&x)[WIDTH],
                                            const unsigned char* chunk) {
    const Vector v = *reinterpret_cast<const Vector*>(chunk);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = widen(v.element[i]);
}

// sums += the products of one step, by fused multiply-adds.
template <class Tile>
__device__ __forceinline__ void multiply_fma(const unsigned char* rows,
                                             const unsigned char* columns,
                                             Fragment (&sums)[1]) {
    for (int chunk = 0; chunk < 4; ++chunk) {  // 16 bytes of each row
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

// Compute the tiles 0, 1, ..., one after the other. stage(to, tile, step) starts the
// copies of a step to the stage at `to`; use(tile) is called with the sums of a tile.
//
// The stages form a ring. With n stages, up to n - 1 further steps are in flight while
// one is multiplied. This continues across tiles: the first steps of the next tile
// arrive while the last steps of this tile are multiplied.
template <class Tile, bool tensor_cores, class Stage, class Use>
__device__ __forceinline__ void multiply_steps(unsigned char* stages, int num_tiles,
                                               int steps_per_tile,
                                               Fragment (&sums)[Tile::fragments],
                                               Stage stage, Use use) {
    // The next step to stage. The tile is unsigned: if there is only one tile, the
    // compiler then sees that no other follows.
    unsigned next_tile = 0;
    int next_step = 0;
    const auto stage_next = [&](int slot) {
        if (next_tile < static_cast<unsigned>(num_tiles)) {
            stage(stages + slot * Tile::stage_bytes, next_tile, next_step);
            if (++next_step == steps_per_tile) next_step = 0, ++next_tile;
        }
        cp_async_commit();  // also without a step: one group for each call
    };
    for (int slot = 0; slot < Tile::stages - 1; ++slot) stage_next(slot);

    int slot = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
        clear(sums);
        for (int step = 0; step < steps_per_tile; ++step) {
            cp_async_wait<Tile::stages - 2>();
            // Now all threads' copies of this step have arrived, and all warps have
            // multiplied the step before it: its stage is free for the next copies.
            __syncthreads();
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

// Multiply one tile of rows of A by the tiles 0, 1, ... of rows of B; call use(tile)
// with the sums of each. The first `dim` elements of every row are read, and rows lie
// `stride` elements apart. `stages` is shared memory of Tile::bytes; the caller may use
// it again when this function returns.
template <class Tile, bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim, long long stride,
                                               Fragment (&sums)[Tile::fragments],
                                               Use use) {
    constexpr int threads = Tile::threads;
    const int steps_per_tile = static_cast<int>((dim + STEP - 1) / STEP);
    const int alignment = common_alignment(a, b, stride | dim);
    const auto rows_from = [&](unsigned tile) {
        const long long first = static_cast<long long>(tile) * Tile::columns;
        return Rows{b.data + first * stride, b.count - first};
    };
    // Two separate loops: with both ways of staging in one loop, the common way would
    // have fewer registers.
    if (in_chunks(alignment, stride)) {
        const Chunks<Tile::rows, threads> of_a(a, stride);
        Chunks<Tile::columns, threads> of_b(b, stride);
        const int target = staged(threadIdx.x / 4, threadIdx.x % 4);
        // A chunk exists if its first column, column + threadIdx.x % 4 * WIDTH, < dim.
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
                alignment, to, a, rows_from(tile), step * STEP, dim, stride);
        };
        multiply_steps<Tile, tensor_cores>(stages, num_tiles, steps_per_tile, sums,
                                           stage, use);
    }
}

// The same for rows that follow each other without gaps.
template <class Tile, bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim,
                                               Fragment (&sums)[Tile::fragments],
                                               Use use) {
    multiply_tiles<Tile, tensor_cores>(stages, a, b, num_tiles, dim, dim, sums, use);
}

// Stage all steps of a tile's rows, which have no gaps; each step in its own stage.
template <int num_rows, int threads>
__device__ __noinline__ void stage_all(int alignment, unsigned char* to, Rows rows,
                                       long long dim) {
    for (long long k = 0; k < dim; k += STEP, to += num_rows * STEP_BYTES)
        stage_pieces<num_rows, 0, threads>(alignment, to, rows, rows, k, dim, dim);
}

// Do the work of `multiply_tiles` for short rows. All steps of A's tile stay in shared
// memory and are copied only once. B's tiles alternate between two buffers: while one
// tile is multiplied, the next one arrives. `shared` holds A's tile and two of B's,
// each as a sequence of whole steps.
template <class Tile, class Use>
__device__ __forceinline__ void multiply_kept(unsigned char* shared, const Rows& a,
                                              const Rows& b, int num_tiles,
                                              long long dim,
                                              Fragment (&sums)[Tile::fragments],
                                              Use use) {
    static_assert(Tile::rows == Tile::columns);
    constexpr int step_bytes = Tile::rows * STEP_BYTES;
    const int tile_bytes = static_cast<int>((dim + STEP - 1) / STEP) * step_bytes;
    const bool chunks = in_chunks(common_alignment(a, b, dim), dim);
    const auto stage = [&](int at, const Rows& rows) {
        if (chunks) {
            const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
            const Chunks<Tile::rows, Tile::threads> part(rows, dim);
            unsigned char* to = shared + at + staged(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll 1
            for (int k = 0; k < dim; k += STEP, to += step_bytes)
                part.stage(to, k, k < rest);
        } else {
            stage_all<Tile::rows, Tile::threads>(common_alignment(a, b, dim),
                                                 shared + at, rows, dim);
        }
    };
    stage(0, a);
    stage(tile_bytes, b);
    int now = tile_bytes, next = 2 * tile_bytes;  // offsets of B's two buffers
    for (int tile = 0; tile < num_tiles; ++tile) {
        cp_async_commit();
        cp_async_wait<0>();
        // Now the copies of this tile have arrived for all threads, and all warps have
        // multiplied the tile before it: its buffer is free for the next copies.
        __syncthreads();
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
        now = 3 * tile_bytes - now;  // the other buffer
    }
    __syncthreads();
}

// Return bits: bit i is 1 if the thread's i-th row (or column) of the tile is a token.
// The tile starts at token `first`; position(i) is the i-th row within the tile.
template <int count, class Position>
__device__ __forceinline__ unsigned tokens_among(const bool* mask, long long first,
                                                 long long num_tokens,
                                                 Position position) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const long long token = first + position(i);
        bits |= unsigned(token < num_tokens && is_token(mask, token)) << i;
    }
    return bits;
}

// The first row and column of a tile of a symmetric product. They fit in an int: the
// N x N matrix of a sequence has fewer than 2^31 rows, as a launch has fewer than 2^31
// blocks.
struct Corner {
    int row, column;
};

// Return the index-th tile that contains the diagonal or lies above it: S = A Aᵀ is
// symmetric, so the tiles below are not computed. The matrix is divided into squares as
// wide as a tile. The squares on and above the diagonal are counted row by row, and
// each is divided from top to bottom into `parts` tiles. A tile of the last square may
// lie entirely past the last row; the caller checks for it.
template <class Tile>
__device__ __forceinline__ Corner upper_tile(unsigned index, unsigned num_squares) {
    constexpr unsigned parts = Tile::columns / Tile::rows;
    const unsigned part = index % parts;
    // Square (i, i + j): row i has num_squares - i squares from the diagonal on.
    unsigned i = 0, j = index / parts;
    for (; j >= num_squares - i; ++i) j -= num_squares - i;
    return {static_cast<int>(i * Tile::columns + part * Tile::rows),
            static_cast<int>((i + j) * Tile::columns)};
}
