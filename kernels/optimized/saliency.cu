// Saliency: entropies without the N x N scores, by tiles; see basic/saliency.cu.
//
// A score lives in one thread's registers only. Each thread keeps the state of its rows
// (softmax_states.cuh); states are merged in a fixed order, so that every run gives the
// same bits.

// One block, one tile (i <= j) of one sequence: the states of its rows, and, off the
// diagonal, of its columns, for they are rows of the lower half. states_out: (B, T, N,
// 3).
extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    self_attention_states(const real_t* tokens, const bool* mask, long long batch,
                          long long num_tokens, long long dim, acc_t* states_out) {
    __shared__ __align__(16) unsigned char stages[STAGES * STAGE_BYTES];
    const long long num_tiles = (num_tokens + TILE - 1) / TILE;
    const long long tiles = num_tiles * (num_tiles + 1) / 2;
    const long long b = blockIdx.x / tiles, first = b * num_tokens;
    long long tile_i, tile_j;
    upper_tile(blockIdx.x % tiles, num_tiles, &tile_i, &tile_j);
    const long long row0 = tile_i * TILE, column0 = tile_j * TILE;

    const real_t* sequence = tokens + first * dim;  // (N, D)
    acc_t scores[4][16];
    multiply_tiles(stages, {sequence + row0 * dim, num_tokens - row0},
                   {sequence + column0 * dim, num_tokens - column0}, 1, dim, scores,
                   [](int) {});
    const acc_t scale = acc_t(LOG2_E) / sqrt(static_cast<acc_t>(dim));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 16; ++j) scores[i][j] *= scale;

    const bool* valid = mask ? mask + first : nullptr;
    if (valid || column0 + TILE > num_tokens) {  // not all rows and columns are tokens
        const unsigned rows = tokens_among<4>(valid, row0, num_tokens, tile_row);
        const unsigned columns =
            tokens_among<16>(valid, column0, num_tokens, tile_column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 16; ++j)
                if (!(rows >> i & columns >> j & 1)) scores[i][j] = NEVER;
    }
    auto* of_rows = reinterpret_cast<acc_t*>(stages);  // (2, TILE, 3), a warp's columns
    acc_t* of_columns = of_rows + 2 * TILE * 3;        // (4, TILE, 3), a warp's rows
    const int warp = threadIdx.x / 32;
    const Exponents units;
    if (tile_i != tile_j) {
#pragma unroll
        for (int first = 0; first < 16; first += 8) {
            State states[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                acc_t column[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) column[i] = scores[i][first + j];
                states[j].add(column, units);
            }
            write_columns(of_columns + warp / 2 * TILE * 3, states, first, tile_column);
        }
    }
    State states[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i].add(scores[i], units);
    write_rows(of_rows + warp % 2 * TILE * 3, states, tile_row);
    __syncthreads();

    // Half of the threads merge a row's two states, half a column's four.
    const bool is_row = threadIdx.x < TILE;
    const int index = threadIdx.x % TILE;
    const long long token = (is_row ? row0 : column0) + index;
    if (token >= num_tokens || (!is_row && tile_i == tile_j)) return;
    const State state = is_row ? merge_parts<2>(of_rows + index * 3)
                               : merge_parts<4>(of_columns + index * 3);
    const long long slot = b * num_tiles + (is_row ? tile_j : tile_i);
    write_state(states_out + (slot * num_tokens + token) * 3, state);
}

// The entropy of every row from its T states.
extern "C" __global__ void self_attention_entropy(const acc_t* states, const bool* mask,
                                                  long long batch, long long num_tokens,
                                                  long long num_states, acc_t* out) {
    const long long index = thread_index();  // (B, N)
    if (index >= batch * num_tokens) return;
    const long long b = index / num_tokens, i = index % num_tokens;
    State state;
    for (long long s = b * num_states; s < (b + 1) * num_states; ++s)
        state.merge(read_state(states + (s * num_tokens + i) * 3));
    out[index] = is_token(mask, index) ? state.value() : 0;
}

// One block, 128 rows of one head; it passes by all keys, or those up to its last row.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    query_key_entropy(const real_t* query, const real_t* key, const bool* mask,
                      long long outer, long long batch, long long heads,
                      long long num_tokens, long long head_dim, long long causal,
                      double scale, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[STAGES * STAGE_BYTES];
    const long long row_tiles = (num_tokens + TILE - 1) / TILE;
    const long long head = blockIdx.x / row_tiles;  // (L, B, H)
    // Causal rows near the end have most to do: they go first.
    const long long row_tile = row_tiles - 1 - blockIdx.x % row_tiles;
    const long long row0 = row_tile * TILE;
    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;

    const real_t* queries = query + (head * num_tokens + row0) * head_dim;
    const real_t* keys = key + head * num_tokens * head_dim;
    const int num_tiles = static_cast<int>(causal ? row_tile + 1 : row_tiles);
    const ScaledExponents units(scale);
    acc_t scores[4][16];
    State states[4];
    for (State& state : states) state.m = units.never();
    multiply_tiles(stages, {queries, num_tokens - row0}, {keys, num_tokens}, num_tiles,
                   head_dim, scores, [&](int tile) {
                       const long long column0 = static_cast<long long>(tile) * TILE;
                       // No tile is behind the one on the diagonal.
                       const bool diagonal = causal && column0 == row0;
                       if (diagonal || valid || column0 + TILE > num_tokens) {
                           const acc_t never = units.never();
                           const unsigned columns = tokens_among<16>(
                               valid, column0, num_tokens, tile_column);
#pragma unroll
                           for (int i = 0; i < 4; ++i) {
                               const int last = diagonal ? tile_row(i) : TILE;
#pragma unroll
                               for (int j = 0; j < 16; ++j) {
                                   const bool seen =
                                       columns >> j & 1 && tile_column(j) <= last;
                                   if (!seen) scores[i][j] = never;
                               }
                           }
                       }
#pragma unroll
                       for (int i = 0; i < 4; ++i) states[i].add(scores[i], units);
                   });

    // (2, TILE, 3): columns of two warps.
    auto* parts = reinterpret_cast<acc_t*>(stages);
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i] = states[i].exact(units);
    write_rows(parts + threadIdx.x / 32 % 2 * TILE * 3, states, tile_row);
    __syncthreads();
    const long long row = row0 + threadIdx.x;
    if (threadIdx.x >= TILE || row >= num_tokens) return;
    const State state = merge_parts<2>(parts + threadIdx.x * 3);
    out[head * num_tokens + row] = is_token(valid, row) ? state.value() : 0;
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
