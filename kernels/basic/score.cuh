// Return the attention score of a query (dim,) and a key (dim,): q . k scale. Two calls
// with the same arguments return the same bits (`rounded_product` in common.cuh).
__device__ acc_t score(const real_t* query, const real_t* key, long long dim,
                       double scale) {
    acc_t dot = 0;
    for (long long d = 0; d < dim; ++d) dot += widen(query[d]) * widen(key[d]);
    return rounded_product(dot, acc_t(scale));
}
