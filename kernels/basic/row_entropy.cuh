// Return the entropy, in nats, of the attention of one query (D,) over the first
// `num_keys` of the keys (N, D). SoftmaxEntropy (common.cuh) adds the scores one by
// one, so they are not stored. `sequence_start` is the first token of the sequence in
// the mask (B, N).
__device__ acc_t row_entropy(const real_t* query, const real_t* keys, const bool* mask,
                             long long sequence_start, long long num_keys,
                             long long dim, acc_t scale) {
    SoftmaxEntropy entropy;
    for (long long j = 0; j < num_keys; ++j) {
        if (!is_token(mask, sequence_start + j)) continue;
        acc_t dot = 0;
        for (long long d = 0; d < dim; ++d)
            dot += widen(query[d]) * widen(keys[j * dim + d]);
        entropy.add(dot * scale);
    }
    return entropy.value();
}
