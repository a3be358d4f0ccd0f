// Entropy of self-attention, computed in tiles (tiles.cuh); see
// basic/self_attention_entropy.cu for the formula.
//
// The N x N scores are never stored: a score exists only in the registers of one
// thread. Each thread keeps the online softmax states of its rows and columns (`State`
// in softmax_states.cuh). States are merged in a fixed order, so that every run gives
// the same bits.
//
// The scores S = X Xᵀ / sqrt(D) are symmetric, so only the tiles on and above the
// diagonal are computed. A tile above the diagonal is used twice. Its rows give scores
// of the tokens of its rows. Because s_ij = s_ji, its columns give scores of the tokens
// of its columns: the scores that lie below the diagonal.
//
//   self_attention_states     one block for each tile: partial states of its rows and
//                             columns
//   self_attention_entropy    one thread for each token: merge its partial states
//
// Tokens are divided into squares: square s has the tokens TILE s to TILE s + TILE - 1.
// The state of a token of square c over the tokens of square s comes from a row of a
// tile if s >= c, and from a column of a tile (s_ij = s_ji) if s < c.
//
// The states are in `states_out` (B, slots, N, 3). A token has `halves` slots for each
// square s, from slot `halves` * s on, so slots = num_squares * halves. `halves` is 2
// for HalfTile, else 1. Two half tiles divide the rows of square s, so a column has two
// states, and the lower half writes its state to the second slot. A row writes only to
// the first slot.

// Compute the partial states of one tile, with one block.
template <class Tile>
__device__ __forceinline__ void tile_states(unsigned char* shared, const real_t* tokens,
                                            const bool* mask, long long num_tokens,
                                            long long dim, acc_t* states_out) {
    constexpr int halves = Tile::rows < TILE ? 2 : 1;
    constexpr int squares_across_tile = Tile::columns / TILE;
    const int num_squares = static_cast<int>((num_tokens + TILE - 1) / TILE);
    // `upper_tile` divides S into squares of its own, with sides of Tile::columns (TILE
    // or 2 TILE). There are `tile_squares_per_side` of them along each side.
    const unsigned tile_squares_per_side =
        (num_squares + squares_across_tile - 1) / squares_across_tile;
    const unsigned tiles = tile_squares_per_side * (tile_squares_per_side + 1) / 2 *
                           (Tile::columns / Tile::rows);
    const long long b = blockIdx.x / tiles, sequence_start = b * num_tokens;
    const Corner corner = upper_tile<Tile>(blockIdx.x % tiles, tile_squares_per_side);
    // A tile of the last square may lie past the last token.
    if (Tile::rows < Tile::columns && corner.row >= num_tokens) return;

    const real_t* sequence = tokens + sequence_start * dim;  // (N, D)
    Fragment scores[Tile::fragments];
    multiply_tiles<Tile>(shared, {sequence + corner.row * dim, num_tokens - corner.row},
                         {sequence + corner.column * dim, num_tokens - corner.column},
                         1, dim, scores, [](int) {});
    // The scores in units of ln 2: x_i . x_j / (sqrt(D) ln 2).
    const acc_t scale = acc_t(LOG2_E) / sqrt(static_cast<acc_t>(dim));
#pragma unroll
    for (int f = 0; f < Tile::fragments; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j)
                scores[f][i][j] = rounded_product(scores[f][i][j], scale);

    const bool* valid = mask ? mask + sequence_start : nullptr;
    // Mask padding and the rows and columns past the last token.
    if (valid || corner.column + Tile::columns > num_tokens) {
        const unsigned rows =
            tokens_among<4 * Tile::fragments>(valid, corner.row, num_tokens, Tile::row);
        const unsigned columns =
            tokens_among<16>(valid, corner.column, num_tokens, Tile::column);
#pragma unroll
        for (int i = 0; i < 4 * Tile::fragments; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (!(rows >> i & columns >> j & 1))
                    scores[i / 4][i % 4][j] = MASKED_SCORE;
    }

    // Write the states of every warp to shared memory, which is free after the
    // multiplication: those of rows (warps_across, rows, 3), each over the 64 columns
    // of a warp, and those of columns (rows / 32, columns, 3): one state for each
    // column in each fragment of 32 rows.
    auto* row_states = reinterpret_cast<acc_t*>(shared);
    acc_t* column_states = row_states + Tile::warps_across * Tile::rows * STATE_VALUES;
    const int warp_across = Tile::warp_column() / 64,
              first_fragment = Tile::warp_row() / 32;
    const int row_square = corner.row / TILE, first_square = corner.column / TILE;
    const int square =
        first_square + warp_across / 2;  // the square of the warp's columns
    const Exponents exponents;
#pragma unroll
    for (int f = 0; f < Tile::fragments; ++f) {
        if (row_square < square) {  // above the diagonal, add columns, eight at a time
#pragma unroll
            for (int j0 = 0; j0 < 16; j0 += 8) {
                State states[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    acc_t column[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) column[i] = scores[f][i][j0 + j];
                    states[j].add(column, exponents);
                }
                write_column_states(
                    column_states + (first_fragment + f) * Tile::columns * STATE_VALUES,
                    states, j0, Tile::column);
            }
        }
        if (row_square <= square) {
            State states[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) states[i].add(scores[f][i], exponents);
            write_row_states(row_states + warp_across * Tile::rows * STATE_VALUES,
                             states, [&](int i) { return Tile::row(4 * f + i); });
        }
    }
    __syncthreads();

    // Merge the states of the warps: one thread for each row in each square of columns,
    // and one for each column.
    for (int index = threadIdx.x;
         index < squares_across_tile * Tile::rows + Tile::columns;
         index += Tile::threads) {
        const bool is_row = index < squares_across_tile * Tile::rows;
        const int k = is_row ? index / Tile::rows
                             : (index - squares_across_tile * Tile::rows) / TILE;
        const int column_square = first_square + k;
        if (column_square >= num_squares || row_square > column_square) continue;
        if (!is_row && row_square == column_square) continue;
        // The index of the row or column within the tile.
        const int offset =
            is_row ? index % Tile::rows : index - squares_across_tile * Tile::rows;
        const int token = (is_row ? corner.row : corner.column) + offset;
        if (token >= num_tokens) continue;
        State state;
        if (is_row)
            state = merge_two(row_states + (2 * k * Tile::rows + offset) * STATE_VALUES,
                              Tile::rows * STATE_VALUES);
        else if constexpr (halves == 2)
            state = merge_two(column_states + offset * STATE_VALUES,
                              Tile::columns * STATE_VALUES);
        else
            state = merge_four(column_states + offset * STATE_VALUES,
                               Tile::columns * STATE_VALUES);
        const int slot = is_row ? column_square * halves : corner.row * halves / TILE;
        const long long slots = num_squares * halves;
        write_state(
            states_out + ((b * slots + slot) * num_tokens + token) * STATE_VALUES,
            state);
    }
}

// The three kernels differ only in the shape of tile, which the launcher selects:
// `_half` has `HalfTile`, `_wide` has `WideTile` (tiles.cuh).
// Shapes: tokens (B, N, D), mask (B, N), states_out (B, slots, N, 3).
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    self_attention_states(const real_t* tokens, const bool* mask, long long batch,
                          long long num_tokens, long long dim, acc_t* states_out) {
    __shared__ __align__(16) unsigned char stages[WholeTile::bytes];
    tile_states<WholeTile>(stages, tokens, mask, num_tokens, dim, states_out);
}

extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM)
    self_attention_states_half(const real_t* tokens, const bool* mask, long long batch,
                               long long num_tokens, long long dim, acc_t* states_out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    tile_states<HalfTile>(stages, tokens, mask, num_tokens, dim, states_out);
}

extern "C" __global__ void __launch_bounds__(WideTile::threads, 1)
    self_attention_states_wide(const real_t* tokens, const bool* mask, long long batch,
                               long long num_tokens, long long dim, acc_t* states_out) {
    if constexpr (TENSOR_CORES)
        tile_states<WideTile>(dynamic_shared(), tokens, mask, num_tokens, dim,
                              states_out);
}

// The entropy of every token from its partial states. One thread, one token. With
// `halves` = 2, the second slot of a square is used only if the square comes before the
// token's own square. In those tiles the token is a column; in all other tiles it is a
// row, and a row has one state for each square.
// Shapes: states (B, slots, N, 3), mask and out (B, N).
extern "C" __global__ void self_attention_entropy(const acc_t* states, const bool* mask,
                                                  long long batch, long long num_tokens,
                                                  long long halves, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const long long squares = (num_tokens + TILE - 1) / TILE;
    const acc_t* first_state =
        states + (b * squares * halves * num_tokens + i) * STATE_VALUES;
    State state;
    for (long long s = 0; s < squares; ++s) {
        const acc_t* slot = first_state + s * halves * num_tokens * STATE_VALUES;
        State part = read_state(slot);
        if (halves == 2 && s < i / TILE)
            part.merge(read_state(slot + num_tokens * STATE_VALUES));
        state.merge(part);
    }
    out[index] = is_token(mask, index) ? state.value() : 0;
}
