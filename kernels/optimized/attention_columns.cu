// Sums of the attention of queries to each key, or the largest attention; see
// basic/attention_columns.cu for the formula and the shapes.
//
// One block, 32 keys of one head: lane l of every warp has key l, and a warp has every
// BLOCK_THREADS / 32-th query. All lanes read the same element of a query at a time, so
// that a query is read once for 32 keys. The block reads its keys again for each query,
// from the L1 cache. The floor is one read of the queries for 32 keys, and 2 d
// operations for each query and key. Each warp keeps one sum for each key; the warps
// are added in order, so every run gives the same bits.
extern "C" __global__ void attention_columns(
    const real_t* query, const real_t* keys, const acc_t* log_sum_exp,
    const acc_t* bias, const bool* mask, long long outer, long long group,
    long long batch, long long heads, long long num_queries, long long num_keys,
    long long head_dim, long long causal, double scale, long long power, acc_t* out) {
    constexpr int warps = BLOCK_THREADS / 32;
    __shared__ acc_t sums[warps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long blocks_per_head = (num_keys + 31) / 32;
    const long long head = blockIdx.x / blocks_per_head;
    const long long j = blockIdx.x % blocks_per_head * 32 + lane;
    const long long key = head * num_keys + j;
    const bool exists = j < num_keys;
    const acc_t b = exists && bias ? bias[key] : acc_t(0);
    const bool seen = exists && !(b < MASKED_SCORE) &&
                      is_token(mask, head / heads % batch * num_keys + j);

    acc_t sum = 0;
    const acc_t p = power ? acc_t(power) : acc_t(1);
    const long long rows = group * num_queries;
    for (long long g = warp; g < rows; g += warps) {
        const long long row = head * rows + g;
        const long long last = num_keys - num_queries + g % num_queries;
        const acc_t z = log_sum_exp[row];  // the same for all lanes
        if (z < MASKED_SCORE || !seen || (causal && j > last)) continue;
        acc_t dot = 0;
        for (long long d = 0; d < head_dim; d += WIDTH) {
            acc_t k[WIDTH], q[WIDTH];
            load_vector(k, keys + key * head_dim + d, head_dim - d);
            load_vector(q, query + row * head_dim + d, head_dim - d);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) dot += q[i] * k[i];  // 0 past the end
        }
        const acc_t s = rounded_product(dot, acc_t(scale)) + b;
        const acc_t a = exp(min(p * (s - z), acc_t(80)));
        sum = power ? sum + a : max(sum, a);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || !exists) return;
    for (int w = 1; w < warps; ++w)
        sum = power ? sum + sums[w][lane] : max(sum, sums[w][lane]);
    out[key] = sum;
}
