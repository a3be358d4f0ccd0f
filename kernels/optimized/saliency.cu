// Saliency: entropies without the N x N scores, by tiles; see basic/saliency.cu.
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
                if (!(rows >> i & columns >> j & 1)) scores[i / 4][i % 4][j] = NEVER;
    }

    // (across, rows, 3), a warp's columns; (down, columns, 3), a fragment's rows.
    auto* of_rows = reinterpret_cast<acc_t*>(shared);
    acc_t* of_columns = of_rows + Tile::across * Tile::rows * 3;
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
                write_columns(of_columns + (down + f) * Tile::columns * 3, states, j0,
                              Tile::column);
            }
        }
        if (row_square <= square) {
            State states[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) states[i].add(scores[f][i], units);
            write_rows(of_rows + across * Tile::rows * 3, states,
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
            state =
                merge_two(of_rows + (2 * k * Tile::rows + place) * 3, Tile::rows * 3);
        else if constexpr (halves == 2)
            state = merge_two(of_columns + place * 3, Tile::columns * 3);
        else
            state = merge_four(of_columns + place * 3, Tile::columns * 3);
        const int slot = is_row ? other * halves : corner.row * halves / TILE;
        const long long slots = num_squares * halves;
        write_state(states_out + ((b * slots + slot) * num_tokens + token) * 3, state);
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
    const acc_t* own = states + (b * squares * halves * num_tokens + i) * 3;
    State state;
    for (long long s = 0; s < squares; ++s) {
        const acc_t* slot = own + s * halves * num_tokens * 3;
        State part = read_state(slot);
        if (halves == 2 && s < i / TILE) part.merge(read_state(slot + num_tokens * 3));
        state.merge(part);
    }
    out[index] = is_token(mask, index) ? state.value() : 0;
}

// One block, Tile::rows rows of one head; it passes by all keys, or those up to its
// last row. `kept`: the queries stay in shared memory, which the launch gives.
template <class Tile, bool kept>
__device__ __forceinline__ void rows_entropy(unsigned char* shared, const real_t* query,
                                             const real_t* key, const bool* mask,
                                             long long batch, long long heads,
                                             long long num_tokens, long long head_dim,
                                             long long causal, double scale,
                                             acc_t* out) {
    const long long row_tiles = (num_tokens + Tile::rows - 1) / Tile::rows;
    const long long head = blockIdx.x / row_tiles;  // (L, B, H)
    // Causal rows near the end have most to do: they go first.
    const long long row0 = (row_tiles - 1 - blockIdx.x % row_tiles) * Tile::rows;
    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;

    const Rows queries = {query + (head * num_tokens + row0) * head_dim,
                          num_tokens - row0};
    const Rows keys = {key + head * num_tokens * head_dim, num_tokens};
    const long long end = causal ? min(row0 + Tile::rows, num_tokens) : num_tokens;
    const int num_tiles = static_cast<int>((end + Tile::columns - 1) / Tile::columns);
    const ScaledExponents units(scale);
    Fragment scores[1];
    State states[4];
    for (State& state : states) state.m = units.never();
    const auto add = [&](int tile) {
        const long long column0 = static_cast<long long>(tile) * Tile::columns;
        const bool diagonal = causal && column0 + Tile::columns > row0;  // or beyond it
        if (diagonal || valid || column0 + Tile::columns > num_tokens) {
            const acc_t never = units.never();
            const int ahead = static_cast<int>(row0 - column0);
            const unsigned columns =
                tokens_among<16>(valid, column0, num_tokens, Tile::column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int last = diagonal ? ahead + Tile::row(i) : Tile::columns;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const bool seen = columns >> j & 1 && Tile::column(j) <= last;
                    if (!seen) scores[0][i][j] = never;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) states[i].add(scores[0][i], units);
    };
    if constexpr (kept)
        multiply_kept<Tile>(shared, queries, keys, num_tiles, head_dim, scores, add);
    else
        multiply_tiles<Tile>(shared, queries, keys, num_tiles, head_dim, scores, add);

    // (2, rows, 3): columns of two warps.
    auto* parts = reinterpret_cast<acc_t*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i] = states[i].exact(units);
    write_rows(parts + Tile::warp_column() / 64 * Tile::rows * 3, states, Tile::row);
    __syncthreads();
    const long long row = row0 + threadIdx.x;
    if (threadIdx.x >= Tile::rows || row >= num_tokens) return;
    const State state = merge_two(parts + threadIdx.x * 3, Tile::rows * 3);
    out[head * num_tokens + row] = is_token(valid, row) ? state.value() : 0;
}

extern "C" __global__ void __launch_bounds__(Whole::threads, TILE_BLOCKS)
    query_key_entropy_kept(const real_t* query, const real_t* key, const bool* mask,
                           long long outer, long long batch, long long heads,
                           long long num_tokens, long long head_dim, long long causal,
                           double scale, acc_t* out) {
    if constexpr (sizeof(acc_t) == 4)
        rows_entropy<Whole, true>(dynamic_shared(), query, key, mask, batch, heads,
                                  num_tokens, head_dim, causal, scale, out);
}

extern "C" __global__ void __launch_bounds__(Half::threads, TILE_BLOCKS + 1)
    query_key_entropy(const real_t* query, const real_t* key, const bool* mask,
                      long long outer, long long batch, long long heads,
                      long long num_tokens, long long head_dim, long long causal,
                      double scale, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[Half::bytes];
    rows_entropy<Half, false>(stages, query, key, mask, batch, heads, num_tokens,
                              head_dim, causal, scale, out);
}

// One warp, one row.
extern "C" __global__ void attention_entropy(const real_t* attention, const bool* mask,
                                             long long outer, long long batch,
                                             long long heads, long long num_tokens,
                                             acc_t* out) {
    const long long row = thread_index() / 32;  // (L, B, H, N)
    if (row >= outer * num_tokens) return;
    const long long first = row / num_tokens / heads % batch * num_tokens;
    const real_t* probabilities = attention + row * num_tokens;  // (N,)
    constexpr acc_t tiny = sizeof(acc_t) == 8 ? 0x1p-1022 : 0x1p-126;
    acc_t sum = 0, logs = 0;  // of p and of p log2 p
    const auto add = [&](const Vector& v, long long j) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            acc_t p = max(widen(v.element[i]), acc_t(0));
            // Behind the end p is 0, and there is no mask.
            if (mask && p > 0 && !mask[first + j + i]) p = 0;
            sum += p;
            logs += p * near_log2(max(p, tiny));
        }
    };
    const long long lane = threadIdx.x % 32 * WIDTH;
    if (grain_of(probabilities, num_tokens) == 16) {
#pragma unroll 4
        for (long long j = lane; j < num_tokens; j += 32 * WIDTH)
            add(read_pieces<uint4>(probabilities + j, num_tokens - j), j);
    } else {
        for (long long j = lane; j < num_tokens; j += 32 * WIDTH)
            add(read_vector(probabilities + j, num_tokens - j), j);
    }
    sum = warp_reduce(sum, Add());
    logs = warp_reduce(logs, Add());
    if (threadIdx.x % 32 != 0) return;
    const bool seen = sum > 0 && is_token(mask, first + row % num_tokens);
    const acc_t mean = logs / sum * acc_t(LN_2);
    out[row] = seen ? max(log(sum) - mean, acc_t(0)) : 0;
}

// One warp, one row.
extern "C" __global__ void token_norms(const real_t* tokens, const bool* mask,
                                       long long num_rows, long long dim, acc_t* out) {
    const long long row = thread_index() / 32;  // (B, N)
    if (row >= num_rows) return;
    acc_t squares = 0;
    const long long end = is_token(mask, row) ? dim : 0;  // the same for all lanes
    for (long long d = threadIdx.x % 32 * WIDTH; d < end; d += 32 * WIDTH) {
        acc_t x[WIDTH];
        load_vector(x, tokens + row * dim + d, dim - d);
        for (int i = 0; i < WIDTH; ++i) squares += x[i] * x[i];
    }
    squares = warp_reduce(squares, Add());
    if (threadIdx.x % 32 == 0) out[row] = sqrt(squares);
}

// One block, THREAD_TOKENS tokens a thread of one layer of one sequence: their range,
// (L, B, parts), and, unless `means` (L, B, N) is null, their means over the heads.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    entropy_range(const real_t* entropy, const bool* mask, long long layers,
                  long long batch, long long heads, long long num_tokens, acc_t* lowest,
                  acc_t* highest, acc_t* means) {
    __shared__ acc_t scratch[32];
    const long long tokens = THREAD_TOKENS * blockDim.x;  // of a part
    const long long parts = (num_tokens + tokens - 1) / tokens;
    const long long row = blockIdx.x / parts;  // (L, B)
    const long long first = blockIdx.x % parts * tokens + threadIdx.x;
    const long long step = blockDim.x;
    const bool* valid = mask ? mask + row % batch * num_tokens : nullptr;  // (N,)
    acc_t mean[THREAD_TOKENS];
    head_means(entropy + row * heads * num_tokens, heads, num_tokens, first, step,
               mean);
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first + t * blockDim.x;
        if (means && i < num_tokens) means[row * num_tokens + i] = mean[t];
    }
    Range range;
    range.add(mean, valid, num_tokens, first, step);
    const acc_t low = block_reduce(range.low, scratch, Least());
    const acc_t high = block_reduce(range.high, scratch, Greatest());
    if (threadIdx.x > 0) return;
    lowest[blockIdx.x] = low;
    highest[blockIdx.x] = high;
}

// One block, THREAD_TOKENS tokens a thread of one sequence, from their means over the
// heads (L, B, N) and the ranges (L, B, parts).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
    saliency(const real_t* means, const bool* mask, const acc_t* lowest,
             const acc_t* highest, long long layers, long long batch,
             long long num_tokens, long long salient_high, acc_t* out) {
    constexpr int LAYERS = 32;  // whose ranges are in shared memory at once
    constexpr int AT_ONCE = 4;  // layers whose means a thread loads at once
    __shared__ acc_t low[LAYERS], width[LAYERS];
    const long long tokens = THREAD_TOKENS * blockDim.x;
    const long long parts = (num_tokens + tokens - 1) / tokens;
    const long long b = blockIdx.x / parts;
    const long long first = blockIdx.x % parts * tokens + threadIdx.x;
    const long long step = blockDim.x;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    acc_t sum[THREAD_TOKENS] = {};
    for (long long l0 = 0; l0 < layers; l0 += LAYERS) {
        const int count =
            static_cast<int>(min(layers - l0, static_cast<long long>(LAYERS)));
        const long long row0 = l0 * batch + b;  // (L, B)
        for (int l = warp; l < count; l += warps) {
            const long long part0 = (row0 + l * batch) * parts;
            join_parts(lowest + part0, highest + part0, parts, low + l, width + l);
        }
        __syncthreads();
        const real_t* rows = means + row0 * num_tokens;
        for (int l = 0; l < count; l += AT_ONCE) {
            acc_t mean[AT_ONCE][THREAD_TOKENS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)  // all loads before the first division
                head_means(rows + min(l + j, count - 1) * batch * num_tokens, 1,
                           num_tokens, first, step, mean[j]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j)
                if (l + j < count) add_layer(mean[j], low[l + j], width[l + j], sum);
        }
        __syncthreads();  // the ranges of the next layers come in their place
    }
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; ++t) {
        const long long i = first + t * blockDim.x, index = b * num_tokens + i;
        if (i >= num_tokens) continue;
        const acc_t salient = saliency_of(sum[t], layers, salient_high);
        out[index] = is_token(mask, index) ? salient : acc_t(0);
    }
}
