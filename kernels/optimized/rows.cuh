// A row of numbers, a few of each thread: token t of a thread is threadIdx.x +
// t * blockDim.x. A row of at most THREAD_TOKENS tokens a thread stays in registers, a
// longer one in memory.

struct Held {
    static constexpr bool IN_REGISTERS = true;
    acc_t of[THREAD_TOKENS];

    __device__ __forceinline__ acc_t get(int t, long long) const {
        acc_t x = of[0];
#pragma unroll
        for (int k = 1; k < THREAD_TOKENS; ++k)
            if (t == k) x = of[k];
        return x;
    }
    __device__ __forceinline__ void set(int t, long long, acc_t x) {
#pragma unroll
        for (int k = 0; k < THREAD_TOKENS; ++k)
            if (t == k) of[k] = x;
    }
};

template <class T>
struct Stored {
    static constexpr bool IN_REGISTERS = false;
    T* of;  // (N,)

    __device__ __forceinline__ acc_t get(int, long long i) const {
        return widen(of[i]);
    }
    __device__ __forceinline__ void set(int, long long i, acc_t x) const { of[i] = x; }
};

// Calls visit(t, i) for every token of this thread.
template <class Row, class Visit>
__device__ __forceinline__ void visit_own(const Row&, long long num_tokens,
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
