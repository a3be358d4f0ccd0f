// Return the cosine of two rows (D,) with the given norms, or 0 if either norm is 0.
// cosine_similarity.cu and nearest.cu call this function.

__device__ acc_t cosine(const real_t* x, const real_t* y, acc_t norm_x, acc_t norm_y,
                        long long dim) {
    if (norm_x == 0 || norm_y == 0) return 0;
    acc_t dot = 0;
    for (long long d = 0; d < dim; ++d) dot += widen(x[d]) * widen(y[d]);
    return dot / norm_x / norm_y;
}
