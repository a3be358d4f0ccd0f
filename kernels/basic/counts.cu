// Counts: K of each sequence. While a CUDA graph is captured, the host passes them as
// arguments of launches.

// Write out[first_sequence + i] = the i-th value among the arguments of the launch,
// with out (B,). In this way K of each sequence comes from the host without a copy from
// host memory: a captured graph would not keep the values of such a copy. One thread.
extern "C" __global__ void write_counts(long long first_sequence, long long batch,
                                        long long v0, long long v1, long long v2,
                                        long long v3, long long v4, long long v5,
                                        long long v6, long long v7, long long v8,
                                        long long v9, long long v10, long long v11,
                                        long long v12, long long v13, long long v14,
                                        long long v15, int* out) {
    if (thread_index() > 0) return;
    const long long values[] = {v0, v1, v2,  v3,  v4,  v5,  v6,  v7,
                                v8, v9, v10, v11, v12, v13, v14, v15};
    static_assert(sizeof(values) == COUNTS * sizeof(*values));
#pragma unroll
    for (int i = 0; i < COUNTS; ++i)
        if (first_sequence + i < batch)
            out[first_sequence + i] = static_cast<int>(values[i]);
}
