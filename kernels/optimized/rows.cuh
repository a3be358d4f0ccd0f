// A row of numbers, one for each token of a sequence, divided among the threads of a
// block: the t-th token of a thread is token i = threadIdx.x + t * blockDim.x of the
// row. `RegisterRow` keeps a thread's numbers in registers, for at most THREAD_TOKENS
// tokens; `MemoryRow` keeps a longer row in memory. Both have the functions get(t, i)
// and set(t, i, x).

struct RegisterRow {
    static constexpr bool IN_REGISTERS = true;
    acc_t values[THREAD_TOKENS];  // of this thread's tokens

    // A register has no address, so t is compared with every constant index.
    __device__ __forceinline__ acc_t get(int t, long long) const {
        acc_t x = values[0];
#pragma unroll
        for (int k = 1; k < THREAD_TOKENS; ++k)
            if (t == k) x = values[k];
        return x;
    }
    __device__ __forceinline__ void set(int t, long long, acc_t x) {
#pragma unroll
        for (int k = 0; k < THREAD_TOKENS; ++k)
            if (t == k) values[k] = x;
    }
};

template <class T>
struct MemoryRow {
    static constexpr bool IN_REGISTERS = false;
    T* values;  // (N,)

    __device__ __forceinline__ acc_t get(int, long long i) const {
        return widen(values[i]);
    }
    __device__ __forceinline__ void set(int, long long i, acc_t x) const {
        values[i] = x;
    }
};

// Call visit(t, i) for every token of this thread: its t-th token is token i of the
// row. For a `MemoryRow`, t is always 0, because i alone is the address.
template <class Row, class Visit>
__device__ __forceinline__ void visit_thread_tokens(const Row&, long long num_tokens,
                                                    Visit visit) {
    if constexpr (Row::IN_REGISTERS) {
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; ++t) {
            const int i = threadIdx.x + t * blockDim.x;
            if (i < num_tokens) visit(t, i);
        }
    } else {
        for (long long i = threadIdx.x; i < num_tokens; i += blockDim.x) visit(0, i);
    }
}
