// Tiles of a matrix product: S = A Bᵀ for A and B of shape (rows, dim). A block
// computes one tile of S at a time and keeps its sums in registers.
//
// Steps. Each step copies STEP_BYTES of every row of A and B to a stage in shared
// memory (tile_staging.cuh) and adds the products of these elements to the sums. There
// are several stages: while one step is multiplied, the copies of the next steps are in
// flight. This hides the latency of global memory. The part of one row in a step is
// four chunks of 16 bytes. Against bank conflicts, chunk c of a row is stored at place
// c ^ (row / 2 % 4) (`chunk_offset` in tile_staging.cuh).
//
// Fragments. A tile is divided into fragments of 32 x 64 sums. A warp computes one
// fragment or two, and each of its threads holds 4 rows x 16 columns of a fragment. The
// layout is that of the tensor cores' results (`mma_16x8` in tensor_core.cuh). From
// sm_80 on, tensor cores multiply the 16-bit types, and float if TF32 is allowed.
// Otherwise ordinary fused multiply-adds (FMA) compute the same layout.
//
// Bits. Every shape of tile consists of the same fragments and adds the products in the
// same order. Therefore every shape gives the same bits.

constexpr bool TENSOR_CORES = (sizeof(real_t) == 2 || TF32) && __CUDA_ARCH__ >= 800;
// The second launch bound of kernels with a `WholeTile` or `HalfTile`: at least this
// many blocks must fit on one SM. (In query_key_entropy.cu and attention_received.cu,
// kernels with tiles of 64 rows have a bound of one more.) For a `WholeTile`, the
// registers of an SM are enough for two blocks only with the 16-bit types on tensor
// cores. TF32 and FMA need more registers.
constexpr int TILE_BLOCKS_PER_SM = TENSOR_CORES && !TF32 ? 2 : 1;

using Fragment = acc_t[4][16];  // a thread's part: 4 rows, 16 columns

// A tile of `rows` x `columns`, and how the warps of a block divide it. There are
// `warps_across` warps side by side, each 64 columns wide, and `warps_down` warps one
// below the other, each with `fragments` fragments of 32 rows. `num_stages` is the
// number of stages in shared memory.
template <int rows_, int columns_, int fragments_, int num_stages_>
struct Shape {
    static constexpr int rows = rows_, columns = columns_, fragments = fragments_;
    static constexpr int num_stages = num_stages_;
    static constexpr int warps_across = columns / 64,
                         warps_down = rows / (32 * fragments);
    static constexpr int threads = warps_across * warps_down * 32;
    static constexpr int stage_bytes =
        (rows + columns) * STEP_BYTES;  // rows of A, then of B
    static constexpr int bytes = num_stages * stage_bytes;

    // The first row and column of a thread's warp.
    static __device__ __forceinline__ int warp_row() {
        return threadIdx.x / 32 / warps_across * (32 * fragments);
    }
    static __device__ __forceinline__ int warp_column() {
        return threadIdx.x / 32 % warps_across * 64;
    }
    // The thread's i-th row and j-th column in the tile. A thread has 4 rows and 16
    // columns of each fragment; i = 4 to 7 are the rows of the second fragment. Lane l
    // has the rows l / 4, l / 4 + 8, ... and two neighbouring columns of every eight.
    static __device__ __forceinline__ int row(int i) {
        return warp_row() + i * 8 + threadIdx.x % 32 / 4;
    }
    static __device__ __forceinline__ int column(int j) {
        return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
    }
};
using WholeTile = Shape<TILE, TILE, 1, 3>;
// For small inputs, and for large ones in query_key_entropy.cu if queries are not kept.
using HalfTile = Shape<TILE / 2, TILE, 1, 4>;
// For tensor cores only, with one block on an SM. Such a tile reads 3/4 of the bytes
// that two `WholeTile` tiles of the same area read.
using WideTile = Shape<TILE, 2 * TILE, 2, WIDE_STAGES>;
// The launchers assume these sizes (qm_cupy/cuda/tiles.py).
static_assert(WholeTile::threads == BLOCK_THREADS &&
              HalfTile::threads == BLOCK_THREADS / 2 &&
              WideTile::threads == BLOCK_THREADS);

// sums += the products of one step, on the tensor cores. `rows` is the step of A in
// shared memory, and `columns` that of B: the rows of B are the columns of S.
template <class Tile>
__device__ __forceinline__ void multiply_mma(const unsigned char* rows,
                                             const unsigned char* columns,
                                             Fragment (&sums)[Tile::fragments]) {
    const int lane = threadIdx.x % 32;
    // `ldmatrix_x4` loads four 8 x 8 matrices; lanes 8 i to 8 i + 7 pass the addresses
    // of the rows of matrix i. For A the matrices are rows 0-7 and 8-15 of chunk 0,
    // then the same rows of chunk 1. For B the matrices are chunks 0 and 1 of rows 0-7,
    // then the same chunks of rows 8-15.
    //
    // `a0` and `b0` are the offsets of the first half of the step, chunks 0 and 1. The
    // second half has chunks 2 and 3, that is c ^ 2. The place of a chunk is c ^ (a
    // number that depends on the row). So the place changes by ^ 2 too, and the offset
    // by ^ 32, which is 2 chunks of 16 bytes. Rows 16, 32, ... further have the same
    // permutation, because it repeats every 8 rows, so they only add to the offset.
    const int a0 = chunk_offset(Tile::warp_row() + lane % 16, lane / 16);
    const int b0 =
        chunk_offset(Tile::warp_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step_half = 0; step_half < 2; ++step_half) {  // two chunks of every row
        const unsigned char* from_a = rows + (a0 ^ step_half * 32);
        const unsigned char* from_b = columns + (b0 ^ step_half * 32);
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
                    auto& first_8_rows = sums[m / 2][m % 2 * 2];
                    auto& next_8_rows = sums[m / 2][m % 2 * 2 + 1];
                    const int j = 2 * (n + s);
                    mma_16x8(first_8_rows[j], first_8_rows[j + 1], next_8_rows[j],
                             next_8_rows[j + 1], a[m], strips[s], real_t());
                }
        }
    }
}

// Load a chunk from a stage, where every chunk is whole and aligned.
__device__ __forceinline__ void load_chunk(acc_t (&x)[WIDTH],
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
    for (int chunk = 0; chunk < 4; ++chunk) {  // one chunk of every row
        acc_t a[4][WIDTH], b[WIDTH];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            load_chunk(a[i], rows + chunk_offset(Tile::row(i), chunk));
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            load_chunk(b, columns + chunk_offset(Tile::column(j), chunk));
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

// Compute the tiles 0, 1, ..., one after the other. copy_step(to, tile, step) starts
// the copies of a step to the stage at `to`; use(tile) is called with the sums of a
// tile.
//
// The stages form a ring. With n stages, the copies of up to n - 1 later steps are in
// flight while one step is multiplied. This continues across tiles: the first steps of
// the next tile arrive while the last steps of this tile are multiplied.
template <class Tile, bool tensor_cores, class CopyStep, class Use>
__device__ __forceinline__ void multiply_steps(unsigned char* stages, int num_tiles,
                                               int steps_per_tile,
                                               Fragment (&sums)[Tile::fragments],
                                               CopyStep copy_step, Use use) {
    // The next step to copy. The tile is unsigned: with num_tiles = 1, the condition
    // next_tile < 1 means next_tile == 0, so the compiler removes the code for later
    // tiles.
    unsigned next_tile = 0;
    int next_step = 0;
    const auto copy_next_step = [&](int stage_index) {
        if (next_tile < static_cast<unsigned>(num_tiles)) {
            copy_step(stages + stage_index * Tile::stage_bytes, next_tile, next_step);
            if (++next_step == steps_per_tile) next_step = 0, ++next_tile;
        }
        // Commit a group in every call, even an empty one: `cp_async_wait` counts
        // groups.
        cp_async_commit();
    };
    for (int stage_index = 0; stage_index < Tile::num_stages - 1; ++stage_index)
        copy_next_step(stage_index);

    int stage_index = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
        clear(sums);
        for (int step = 0; step < steps_per_tile; ++step) {
            // Of the num_stages - 1 groups in flight, the first one has this step.
            cp_async_wait<Tile::num_stages - 2>();
            // After this barrier, the copies of all threads for this step have arrived,
            // and all warps have multiplied the step before it. The stage of that step
            // is therefore free for the next copies.
            __syncthreads();
            copy_next_step(stage_index == 0 ? Tile::num_stages - 1 : stage_index - 1);
            const unsigned char* rows = stages + stage_index * Tile::stage_bytes;
            multiply<Tile, tensor_cores>(rows, rows + Tile::rows * STEP_BYTES, sums);
            stage_index = stage_index == Tile::num_stages - 1 ? 0 : stage_index + 1;
        }
        use(tile);
    }
    // After this barrier, the caller may use the stages again.
    cp_async_wait<0>();
    __syncthreads();
}

// Multiply one tile of rows of A by the tiles 0, 1, ... of rows of B; call use(tile)
// with the sums of each tile. The first `dim` elements of every row are read, and rows
// lie `stride` elements apart. `stages` is shared memory of Tile::bytes. The function
// ends with a barrier, so the caller may then use this memory.
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
        const long long first_row = static_cast<long long>(tile) * Tile::columns;
        return Rows{b.data + first_row * stride, b.count - first_row};
    };
    // There are two separate loops, because a loop with both ways of copying would
    // leave fewer registers for the common way.
    if (in_chunks(alignment, stride)) {
        const Chunks<Tile::rows, threads> of_a(a, stride);
        Chunks<Tile::columns, threads> of_b(b, stride);
        const int target = chunk_offset(threadIdx.x / 4, threadIdx.x % 4);
        // A chunk exists if its first column, column + threadIdx.x % 4 * WIDTH, < dim.
        const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
        const auto copy_step = [&](unsigned char* to, unsigned tile, int step) {
            const int column = step * STEP;
            if (step == 0 && tile > 0)
                of_b = Chunks<Tile::columns, threads>(rows_from(tile), stride);
            to += target;
            of_a.copy(to, column, column < rest);
            of_b.copy(to + Tile::rows * STEP_BYTES, column, column < rest);
        };
        multiply_steps<Tile, tensor_cores>(stages, num_tiles, steps_per_tile, sums,
                                           copy_step, use);
    } else {
        const auto copy_step = [&](unsigned char* to, unsigned tile, int step) {
            copy_pieces<Tile::rows, Tile::columns, threads>(
                alignment, to, a, rows_from(tile), step * STEP, dim, stride);
        };
        multiply_steps<Tile, tensor_cores>(stages, num_tiles, steps_per_tile, sums,
                                           copy_step, use);
    }
}

// Do the same for rows that follow each other without gaps (stride = dim).
template <class Tile, bool tensor_cores = TENSOR_CORES, class Use>
__device__ __forceinline__ void multiply_tiles(unsigned char* stages, const Rows& a,
                                               const Rows& b, int num_tiles,
                                               long long dim,
                                               Fragment (&sums)[Tile::fragments],
                                               Use use) {
    multiply_tiles<Tile, tensor_cores>(stages, a, b, num_tiles, dim, dim, sums, use);
}

// Copy all steps of a tile's rows, each step to a stage of its own. The rows have no
// gaps.
template <int num_rows, int threads>
__device__ __noinline__ void copy_all_steps(int alignment, unsigned char* to, Rows rows,
                                            long long dim) {
    for (long long k = 0; k < dim; k += STEP, to += num_rows * STEP_BYTES)
        copy_pieces<num_rows, 0, threads>(alignment, to, rows, rows, k, dim, dim);
}

// Do the work of `multiply_tiles` for short rows. The tile of A stays in shared memory,
// with all its steps, and is copied only once ("kept"). The tiles of B alternate
// between two buffers: while one tile is multiplied, the next one arrives. `shared`
// holds one tile of A and two of B, each as a sequence of whole steps.
template <class Tile, class Use>
__device__ __forceinline__ void multiply_kept(unsigned char* shared, const Rows& a,
                                              const Rows& b, int num_tiles,
                                              long long dim,
                                              Fragment (&sums)[Tile::fragments],
                                              Use use) {
    static_assert(Tile::rows == Tile::columns);
    constexpr int step_bytes = Tile::rows * STEP_BYTES;
    const int tile_bytes = static_cast<int>((dim + STEP - 1) / STEP) * step_bytes;
    const bool aligned = in_chunks(common_alignment(a, b, dim), dim);
    const auto copy_tile = [&](int at, const Rows& rows) {
        if (aligned) {
            const int rest = static_cast<int>(dim) - threadIdx.x % 4 * WIDTH;
            const Chunks<Tile::rows, Tile::threads> chunks_of_tile(rows, dim);
            unsigned char* to =
                shared + at + chunk_offset(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll 1
            for (int k = 0; k < dim; k += STEP, to += step_bytes)
                chunks_of_tile.copy(to, k, k < rest);
        } else {
            copy_all_steps<Tile::rows, Tile::threads>(common_alignment(a, b, dim),
                                                      shared + at, rows, dim);
        }
    };
    copy_tile(0, a);
    copy_tile(tile_bytes, b);
    int current_buffer = tile_bytes,
        next_buffer = 2 * tile_bytes;  // offsets of B's two buffers
    for (int tile = 0; tile < num_tiles; ++tile) {
        cp_async_commit();
        cp_async_wait<0>();
        // After this barrier, the copies of all threads for this tile have arrived, and
        // all warps have multiplied the tile before it. The buffer of that tile is
        // therefore free for the next copies.
        __syncthreads();
        if (tile + 1 < num_tiles) {
            const long long first_row =
                static_cast<long long>(tile + 1) * Tile::columns;
            copy_tile(next_buffer, {b.data + first_row * dim, b.count - first_row});
        }
        clear(sums);
#pragma unroll 1
        for (int at = 0; at < tile_bytes; at += step_bytes)
            multiply<Tile, TENSOR_CORES>(shared + at, shared + current_buffer + at,
                                         sums);
        use(tile);
        next_buffer = current_buffer;
        current_buffer = 3 * tile_bytes - current_buffer;  // the other buffer
    }
    __syncthreads();  // the caller may use `shared` again
}

// Return bits: bit i is 1 if the thread's i-th row (or column) of the tile is a token.
// The tile starts at token `first_token` of the sequence, and `mask` is (N,);
// position(i) is the index of that row or column within the tile.
template <int count, class Position>
__device__ __forceinline__ unsigned tokens_among(const bool* mask,
                                                 long long first_token,
                                                 long long num_tokens,
                                                 Position position) {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const long long token = first_token + position(i);
        bits |= unsigned(token < num_tokens && is_token(mask, token)) << i;
    }
    return bits;
}

// The first row and column of a tile of a symmetric product. Both fit in an int, see
// `upper_tile`.
struct Corner {
    int row, column;
};

// Return the index-th tile that contains the diagonal or lies above it: S = A Aᵀ is
// symmetric, so the tiles below the diagonal are not computed. The matrix is divided
// into squares as wide as a tile, `squares_per_side` along each side. The squares on
// and above the diagonal are numbered row by row, and each is divided from top to
// bottom into `tiles_per_square` tiles. A tile of the last square may lie entirely past
// the last row; the caller checks for this case. There are about
// (N / Tile::columns)^2 / 2 squares, and each has at least one block. A launch has
// fewer than 2^31 blocks, and Tile::columns is at most 256, so N is below 2^24.
template <class Tile>
__device__ __forceinline__ Corner upper_tile(unsigned index,
                                             unsigned squares_per_side) {
    constexpr unsigned tiles_per_square = Tile::columns / Tile::rows;
    const unsigned tile_in_square = index % tiles_per_square;
    // Square (i, i + j): row i has squares_per_side - i squares from the diagonal on.
    unsigned i = 0, j = index / tiles_per_square;
    for (; j >= squares_per_side - i; ++i) j -= squares_per_side - i;
    return {static_cast<int>(i * Tile::columns + tile_in_square * Tile::rows),
            static_cast<int>((i + j) * Tile::columns)};
}
