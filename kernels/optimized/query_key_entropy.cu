// Entropy of the attention of queries to keys, computed in tiles (tiles.cuh); see
// basic/query_key_entropy.cu for the formula and the shapes.
//
// The N x N scores are never stored: a score exists only in the registers of one
// thread. Each thread keeps the online softmax states of its rows (`State` in
// softmax_states.cuh). `ScaledExponents`, in the same file, computes exponents from the
// scores and the scale. States are merged in a fixed order, so that every run gives the
// same bits.

// One block computes the entropies of Tile::rows queries of one head. The block goes
// through all tiles of keys or, with a causal mask, through the tiles up to its last
// query. If `kept` is true, the tile of queries stays in shared memory for all tiles of
// keys (`multiply_kept`), and the launch sets the size of that memory.
template <class Tile, bool kept>
__device__ __forceinline__ void rows_entropy(unsigned char* shared, const real_t* query,
                                             const real_t* key, const bool* mask,
                                             long long batch, long long heads,
                                             long long num_tokens, long long head_dim,
                                             long long causal, double scale,
                                             acc_t* out) {
    const long long row_tiles = (num_tokens + Tile::rows - 1) / Tile::rows;
    const long long head = blockIdx.x / row_tiles;  // (L, B, H)
    // With a causal mask the last rows have the most keys, so their blocks start first.
    const long long row0 = (row_tiles - 1 - blockIdx.x % row_tiles) * Tile::rows;
    const bool* valid = mask ? mask + head / heads % batch * num_tokens : nullptr;

    const Rows queries = {query + (head * num_tokens + row0) * head_dim,
                          num_tokens - row0};
    const Rows keys = {key + head * num_tokens * head_dim, num_tokens};
    const long long num_keys = causal ? min(row0 + Tile::rows, num_tokens) : num_tokens;
    const int num_tiles =
        static_cast<int>((num_keys + Tile::columns - 1) / Tile::columns);
    const ScaledExponents exponents(scale);
    Fragment scores[1];
    State states[4];
    for (State& state : states) state.m = exponents.masked_score();
    const auto add = [&](int tile) {
        const long long column0 = static_cast<long long>(tile) * Tile::columns;
        // Mask keys after the query (the tile reaches the diagonal or lies beyond it),
        // padding, and columns past the last key.
        const bool diagonal = causal && column0 + Tile::columns > row0;
        if (diagonal || valid || column0 + Tile::columns > num_tokens) {
            const acc_t masked = exponents.masked_score();
            const int offset = static_cast<int>(row0 - column0);
            const unsigned columns =
                tokens_among<16>(valid, column0, num_tokens, Tile::column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int last_column =
                    diagonal ? offset + Tile::row(i) : Tile::columns;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const bool seen =
                        columns >> j & 1 && Tile::column(j) <= last_column;
                    if (!seen) scores[0][i][j] = masked;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) states[i].add(scores[0][i], exponents);
    };
    if constexpr (kept)
        multiply_kept<Tile>(shared, queries, keys, num_tiles, head_dim, scores, add);
    else
        multiply_tiles<Tile>(shared, queries, keys, num_tiles, head_dim, scores, add);

    // Write the states to shared memory, which is free after the multiplication. Two
    // warps have the same rows, each with half of the columns, so the states are
    // (2, rows, 3). Then one thread for each row merges the two states.
    auto* parts = reinterpret_cast<acc_t*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) states[i] = states[i].exact(exponents);
    write_row_states(parts + Tile::warp_column() / 64 * Tile::rows * 3, states,
                     Tile::row);
    __syncthreads();
    const long long row = row0 + threadIdx.x;
    if (threadIdx.x >= Tile::rows || row >= num_tokens) return;
    const State state = merge_two(parts + threadIdx.x * 3, Tile::rows * 3);
    out[head * num_tokens + row] = is_token(valid, row) ? state.value() : 0;
}

// For queries of small d, whose tile fits in shared memory and is kept there, as said
// above. Queries of float64 are not kept.
extern "C" __global__ void __launch_bounds__(WholeTile::threads, TILE_BLOCKS_PER_SM)
    query_key_entropy_kept(const real_t* query, const real_t* key, const bool* mask,
                           long long outer, long long batch, long long heads,
                           long long num_tokens, long long head_dim, long long causal,
                           double scale, acc_t* out) {
    if constexpr (sizeof(acc_t) == 4)
        rows_entropy<WholeTile, true>(dynamic_shared(), query, key, mask, batch, heads,
                                      num_tokens, head_dim, causal, scale, out);
}

// The second bound asks the compiler for few enough registers that one more block fits
// on an SM than with a WholeTile. (A block with a HalfTile has half of the threads.)
extern "C" __global__ void __launch_bounds__(HalfTile::threads, TILE_BLOCKS_PER_SM + 1)
    query_key_entropy(const real_t* query, const real_t* key, const bool* mask,
                      long long outer, long long batch, long long heads,
                      long long num_tokens, long long head_dim, long long causal,
                      double scale, acc_t* out) {
    __shared__ __align__(16) unsigned char stages[HalfTile::bytes];
    rows_entropy<HalfTile, false>(stages, query, key, mask, batch, heads, num_tokens,
                                  head_dim, causal, scale, out);
}
