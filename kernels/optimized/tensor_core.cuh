// Asynchronous copies and tensor cores, for tiles.cuh and tile_staging.cuh. All their
// PTX instructions are in the functions of this file.

// The unsigned type of 4, 8 or 16 bytes.
template <int bytes>
struct WordOf {
    using type = unsigned;
};
template <>
struct WordOf<8> {
    using type = uint2;
};
template <>
struct WordOf<16> {
    using type = uint4;
};
template <int bytes>
using Word = typename WordOf<bytes>::type;

// Convert a generic pointer to an address in shared memory, which PTX instructions
// need.
__device__ __forceinline__ unsigned shared_address(const void* address) {
    return static_cast<unsigned>(__cvta_generic_to_shared(address));
}

// Copy 4, 8 or 16 bytes from global to shared memory. From sm_80 on the copy is
// asynchronous: the thread goes on and later waits with `cp_async_wait`. On older GPUs
// the copy is an ordinary load and store. Both addresses must be multiples of `bytes`.
template <int bytes>
__device__ __forceinline__ void cp_async(void* target, const void* source) {
#if __CUDA_ARCH__ >= 800
    if constexpr (bytes == 16)  // .cg bypasses L1, and takes 16 bytes only
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
            "l"(source)
            : "memory");
    else
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(target)),
            "l"(source), "n"(bytes)
            : "memory");
#else
    *static_cast<Word<bytes>*>(target) = *static_cast<const Word<bytes>*>(source);
#endif
}

// Close a group: all copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `pending` of this thread's groups are still in flight. Groups
// complete in the order of their commits.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Load four 8 x 8 matrices of 16-bit elements from shared memory to the registers of a
// warp, in the layout of the operands of `mma_16x8`. Lane 8 i + r passes the address of
// row r of matrix i, and d[i] receives the lane's part of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Add a product on the tensor cores (sm_80 and later): c (16 x 8) += a (16 rows) times
// b (8 columns), summed over 32 bytes of each row and column. 32 bytes are 16 elements
// of 16 bits, or 8 floats, of which the tensor cores ignore the last 13 bits (TF32).
// The sums are float.
//
// The registers of a warp hold c together: lane l has the columns l % 4 * 2 and l % 4 *
// 2 + 1 of row l / 4 in c0 and c1, and the same columns of row l / 4 + 8 in c2 and c3.
#define MMA_16X8(type, shape, name)                                             \
    __device__ __forceinline__ void mma_16x8(float& c0, float& c1, float& c2,   \
                                             float& c3, const unsigned (&a)[4], \
                                             const unsigned (&b)[2], type) {    \
        asm volatile("mma.sync.aligned." shape ".row.col.f32." name "." name    \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
                     "{%0, %1, %2, %3};"                                        \
                     : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),   \
                       "r"(b[1]));                                              \
    }
MMA_16X8(__half, "m16n8k16", "f16")
MMA_16X8(__nv_bfloat16, "m16n8k16", "bf16")
MMA_16X8(float, "m16n8k8", "tf32")

// Copy as `cp_async` does if the source `exists`; otherwise write zeros and do not read
// the source.
template <int bytes>
__device__ __forceinline__ void cp_async_or_zeros(void* target, const void* source,
                                                  bool exists) {
#if __CUDA_ARCH__ >= 800
    static_assert(bytes == 16);
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
        "l"(source), "r"(exists ? 16 : 0)
        : "memory");
#else
    if (exists)
        cp_async<bytes>(target, source);
    else
        *static_cast<Word<bytes>*>(target) = Word<bytes>{};
#endif
}
