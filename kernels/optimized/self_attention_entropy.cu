// Entropy of self-attention without the N x N scores, by tiles; see
// basic/self_attention_entropy.cu.
//
// A score lives in one thread's registers only. Each thread keeps the state of its rows
// (softmax_states.cuh); states are merged in a fixed order, so that every run gives the
// same bits.

// One block, one tile of one sequence on or above the diagonal: the states of its rows
// and, off the diagonal, of its columns, for they are rows of the lower half.
//
// A row of square c (TILE rows) has the columns of square s >= c from the tiles of its
// own rows, and s < c from tiles whose column it is. States of square s lie in slot
// `halves` s of states_out (B, slots, N, 3); those of a column that comes from two
// `Half` tiles, in the next slot too.
template <class Tile>
__device__ __forceinline__ void tile_states(unsigned char* shared, const real_t* tokens,
                                            const bool* mask, long long num_tokens,
                                            long long dim, acc_t* states_out) {
    constexpr int halves = Tile::rows < TILE ? 2 : 1;
    constexpr int squares = Tile::columns / TILE;
    const int num_squares = static_cast<int>((num_tokens + TILE - 1) / TILE);
    const unsigned sides = (num_squares + squares - 1) / squares;
    const unsigned tiles = sides * (sides + 1) / 2 * (Tile::columns / Tile::rows);
    const long long b = blockIdx.x / tiles, first = b * num_tokens;
    const Corner corner = upper_tile<Tile>(blockIdx.x % tiles, sides);
    if (Tile::rows < Tile::columns && corner.row >= num_tokens) return;

    const real_t* sequence = tokens + first * dim;  // (N, D)
    Fragment scores[Tile::fragments];
    multiply_tiles<Tile>(shared, {sequence + corner.row * dim, num_tokens - corner.row},
                         {sequence + corner.column * dim, num_tokens - corner.column},
                         1, dim, scores, [](int) {});
    const acc_t scale = acc_t(LOG2_E) / sqrt(static_cast<acc_t>(dim));
#pragma unroll
    for (int f = 0; f < Tile::fragments; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j)
                scores[f][i][j] = rounded_product(scores[f][i][j], scale);

    const bool* valid = mask ? mask + first : nullptr;
    if (valid || corner.column + Tile::columns > num_tokens) {  // not all are tokens
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

    // (across, rows, 3), a warp's columns; (down, columns, 3), a fragment's rows.
    auto* of_rows = reinterpret_cast<acc_t*>(shared);
    acc_t* of_columns = of_rows + Tile::across * Tile::rows * STATE_VALUES;
    const int across = Tile::warp_column() / 64, down = Tile::warp_row() / 32;
    const int row_square = corner.row / TILE, first_square = corner.column / TILE;
    const int square = first_square + across / 2;  // of the warp's columns
    const Exponents units;
#pragma unroll
    for (int f = 0; f < Tile::fragments; ++f) {
        if (row_square < square) {
#pragma unroll
            for (int j0 = 0; j0 < 16; j0 += 8) {
                State states[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    acc_t column[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) column[i] = scores[f][i][j0 + j];
                    states[j].add(column, units);
                }
                write_columns(of_columns + (down + f) * Tile::columns * STATE_VALUES,
                              states, j0, Tile::column);
            }
        }
        if (row_square <= square) {
            State states[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) states[i].add(scores[f][i], units);
            write_rows(of_rows + across * Tile::rows * STATE_VALUES, states,
                       [&](int i) { return Tile::row(4 * f + i); });
        }
    }
    __syncthreads();

    // A thread merges what the warps have of a row in one square, or of a column.
    for (int index = threadIdx.x; index < squares * Tile::rows + Tile::columns;
         index += Tile::threads) {
        const bool is_row = index < squares * Tile::rows;
        const int k =
            is_row ? index / Tile::rows : (index - squares * Tile::rows) / TILE;
        const int other = first_square + k;  // the square of its columns
        if (other >= num_squares || row_square > other) continue;
        if (!is_row && row_square == other) continue;
        const int place = is_row ? index % Tile::rows : index - squares * Tile::rows;
        const int token = (is_row ? corner.row : corner.column) + place;
        if (token >= num_tokens) continue;
        State state;
        if (is_row)
            state = merge_two(of_rows + (2 * k * Tile::rows + place) * STATE_VALUES,
                              Tile::rows * STATE_VALUES);
        else if constexpr (halves == 2)
            state = merge_two(of_columns + place * STATE_VALUES,
                              Tile::columns * STATE_VALUES);
        else
            state = merge_four(of_columns + place * STATE_VALUES,
                               Tile::columns * STATE_VALUES);
        const int slot = is_row ? other * halves : corner.row * halves / TILE;
        const long long slots = num_squares * halves;
        write_state(
            states_out + ((b * slots + slot) * num_tokens + token) * STATE_VALUES,
            state);
    }
}

extern "C" __global__ void __launch_bounds__(Whole::threads, TILE_BLOCKS)
    self_attention_states(const real_t* tokens, const bool* mask, long long batch,
                          long long num_tokens, long long dim, acc_t* states_out) {
    __shared__ __align__(16) unsigned char stages[Whole::bytes];
    tile_states<Whole>(stages, tokens, mask, num_tokens, dim, states_out);
}

extern "C" __global__ void __launch_bounds__(Half::threads, TILE_BLOCKS)
    self_attention_states_half(const real_t* tokens, const bool* mask, long long batch,
                               long long num_tokens, long long dim, acc_t* states_out) {
    __shared__ __align__(16) unsigned char stages[Half::bytes];
    tile_states<Half>(stages, tokens, mask, num_tokens, dim, states_out);
}

extern "C" __global__ void __launch_bounds__(Wide::threads, 1)
    self_attention_states_wide(const real_t* tokens, const bool* mask, long long batch,
                               long long num_tokens, long long dim, acc_t* states_out) {
    if constexpr (TENSOR_CORES)
        tile_states<Wide>(dynamic_shared(), tokens, mask, num_tokens, dim, states_out);
}

// The entropy of every row from its states. Of `halves` slots to a square, the second
// one is a state of its own where the square comes before the row's own.
extern "C" __global__ void self_attention_entropy(const acc_t* states, const bool* mask,
                                                  long long batch, long long num_tokens,
                                                  long long halves, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    const long long squares = (num_tokens + TILE - 1) / TILE;
    const acc_t* own = states + (b * squares * halves * num_tokens + i) * STATE_VALUES;
    State state;
    for (long long s = 0; s < squares; ++s) {
        const acc_t* slot = own + s * halves * num_tokens * STATE_VALUES;
        State part = read_state(slot);
        if (halves == 2 && s < i / TILE)
            part.merge(read_state(slot + num_tokens * STATE_VALUES));
        state.merge(part);
    }
    out[index] = is_token(mask, index) ? state.value() : 0;
}
