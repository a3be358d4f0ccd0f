// Stands for CUDA, so that g++ compiles the very same .cu files: -include emulator.h.
#pragma once

#include <immintrin.h>
#include <math.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "block.h"
#include "half.h"

#define CUDA_EMULATOR
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("qm_shared")))
#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// clang-format off
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
// clang-format on

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
// As CUDA's: of a NaN and a number, the number.
template <>
inline float min(float a, float b) {
    return std::fmin(a, b);
}
template <>
inline float max(float a, float b) {
    return std::fmax(a, b);
}
template <>
inline double min(double a, double b) {
    return std::fmin(a, b);
}
template <>
inline double max(double a, double b) {
    return std::fmax(a, b);
}
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned __float_as_uint(float x) { return emulator::float_bits(x); }
inline double __longlong_as_double(long long x) {
    double value;
    std::memcpy(&value, &x, sizeof value);
    return value;
}
inline long long __double_as_longlong(double x) {
    long long bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned x) { return emulator::bits_float(x); }
inline float __fmul_rn(float a, float b) { return a * b; }  // none is fused on x86-64
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

// Relaxed: an atomic orders nothing but itself, as in CUDA.
template <class T>
T atomicAdd(T* address, T value) {
    static_assert(std::is_integral_v<T>, "float atomics are not deterministic");
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, T value) {
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
    return old;
}
template <class T>
T atomicMin(T* address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < old &&
           !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
    return old;
}

inline void __syncthreads(HERE) {
    emulator::Barrier& barrier = emulator::block->barrier;
    __tsan_release(&barrier);
    const auto expected = unsigned(emulator::block->fibres.size());
    emulator::arrive(barrier, expected, "__syncthreads", file, line);
    __tsan_acquire(&barrier);
}

inline void __syncwarp(unsigned = ~0u, HERE) {
    void* warp = &emulator::block->warps[emulator::block->current / 32];
    __tsan_release(warp);
    emulator::exchange(0, "__syncwarp", file, line);
    __tsan_acquire(warp);
}

// Wait until `num_blocks` blocks have come, as often as this one has; see common.cuh.
inline void blocks_barrier(unsigned* arrived, unsigned num_blocks, HERE) {
    __syncthreads(file, line);
    if (emulator::block->current == 0) {
        __tsan_release(arrived);
        const unsigned ticket = atomicAdd(arrived, 1u);
        emulator::blocks_move_on();
        const unsigned all = (ticket / num_blocks + 1) * num_blocks;
        while (__atomic_load_n(arrived, __ATOMIC_RELAXED) < all)
            emulator::give_way(file, line);
        __tsan_acquire(arrived);
    }
    __syncthreads(file, line);
}

namespace emulator {

// The value of lane `from(lane)`; only full masks, so that a missing lane is an error.
template <class T, class From>
T shuffle(unsigned mask, T value, From from, const char* file, int line) {
    if (mask != ~0u) fail("a shuffle with a partial mask", file, line);
    const unsigned source = from(lane());
    return exchange(value, "a warp shuffle", file, line)[source < 32 ? source : lane()];
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, HERE) {
    return emulator::shuffle(
        mask, value, [=](unsigned) { return unsigned(source) % 32; }, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, HERE) {
    return emulator::shuffle(
        mask, value, [=](unsigned lane) { return lane ^ bits; }, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, HERE) {
    return emulator::shuffle(
        mask, value, [=](unsigned lane) { return lane - delta; }, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, HERE) {
    return emulator::shuffle(
        mask, value, [=](unsigned lane) { return lane + delta; }, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, HERE) {
    if (mask != ~0u) emulator::fail("a vote with a partial mask", file, line);
    const auto& votes = emulator::exchange(int(predicate), "a warp vote", file, line);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned(votes[lane]) << lane;
    return ballot;
}

inline unsigned __match_any_sync(unsigned mask, int value, HERE) {
    if (mask != ~0u) emulator::fail("a match with a partial mask", file, line);
    const auto& values = emulator::exchange(value, "a warp match", file, line);
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        same |= unsigned(values[lane] == value) << lane;
    return same;
}

namespace emulator {

template <class T>
std::string type_name() {
    using U = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<U>)
        return type_name<std::remove_pointer_t<U>>() + "*";
    if constexpr (std::is_same_v<U, __half>) return "float16";
    if constexpr (std::is_same_v<U, __nv_bfloat16>) return "bfloat16";
    if constexpr (std::is_same_v<U, bool>) return "bool";
    const char* kind = std::is_floating_point_v<U> ? "float"
                       : std::is_unsigned_v<U>     ? "uint"
                                                   : "int";
    if constexpr (std::is_arithmetic_v<U>) return kind + std::to_string(8 * sizeof(U));
    return "unknown";
}

// While this lives, subnormals count as 0 and results that would be subnormal are 0:
// what CuPy's -ftz=true makes of float. The processor's switch is for float and double
// alike, but a GPU never flushes double. So it stays off in kernels of double, and for
// a launch that is given a subnormal double (a temperature of 1e-320, say); no other
// double in a kernel of float comes near 1e-308.
class FlushSubnormals {
    const unsigned before = _mm_getcsr();

  public:
    explicit FlushSubnormals(bool enabled) {
        if (enabled) _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    }
    ~FlushSubnormals() { _mm_setcsr(before); }
};

template <class T>
bool is_subnormal(const void* argument) {
    if constexpr (std::is_same_v<T, double>)
        return std::fpclassify(*static_cast<const double*>(argument)) == FP_SUBNORMAL;
    return false;
}

template <class... Parameters>
struct Kernel {
    void (*function)(Parameters...);

    explicit Kernel(void (*function)(Parameters...)) : function(function) {}

    std::string signature() const { return ((type_name<Parameters>() + " ") + ...); }

    template <size_t... I>
    void call(void** args, std::index_sequence<I...>) const {
        function(*static_cast<std::decay_t<Parameters>*>(args[I])...);
    }
    template <size_t... I>
    bool any_subnormal(void** args, std::index_sequence<I...>) const {
        return (is_subnormal<std::decay_t<Parameters>>(args[I]) || ...);
    }
    const char* launch(const unsigned* grid, const unsigned* block, size_t shared_bytes,
                       bool cooperative, void** args, bool is_float) const {
        const auto indices = std::index_sequence_for<Parameters...>();
        const FlushSubnormals guard(is_float && !any_subnormal(args, indices));
        const auto body = [=, *this] {
            call(args, std::index_sequence_for<Parameters...>());
        };
        return emulator::launch(body, grid, block, shared_bytes, cooperative);
    }
};

}  // namespace emulator

// The Python side adds one of these for every kernel of a file.
#define EMULATE(kernel)                                                                \
    extern "C" const char* signature_##kernel() {                                      \
        static const std::string text = emulator::Kernel(kernel).signature();          \
        return text.c_str();                                                           \
    }                                                                                  \
    extern "C" const char* launch_##kernel(const unsigned* grid,                       \
                                           const unsigned* block, size_t shared_bytes, \
                                           bool cooperative, void** args) {            \
        return emulator::Kernel(kernel).launch(grid, block, shared_bytes, cooperative, \
                                               args, sizeof(acc_t) == sizeof(float));  \
    }

#include "tensor_core.h"
