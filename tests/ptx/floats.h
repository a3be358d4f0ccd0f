// Floating-point operations with the rules of the PTX ISA.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <limits>

#include "program.h"

inline u32 bits(f32 x) { return std::bit_cast<u32>(x); }
inline u64 bits(f64 x) { return std::bit_cast<u64>(x); }
inline f32 float_of(u32 x) { return std::bit_cast<f32>(x); }
inline f64 double_of(u64 x) { return std::bit_cast<f64>(x); }

// .ftz ("flush to zero") replaces a subnormal float by a zero of the same sign: its
// exponent bits are all 0. Doubles have no .ftz.
inline f32 flush(f32 x) {
    return bits(x) & 0x7f800000u ? x : float_of(bits(x) & 1u << 31);
}
inline f64 flush(f64 x) { return x; }

// Every NaN result of float arithmetic has the bits 0x7fffffff. A double keeps its NaN.
inline f32 canonical(f32 x) { return x == x ? x : float_of(0x7fffffffu); }
inline f64 canonical(f64 x) { return x; }

// Arithmetic with .ftz flushes its inputs and its result.
template <bool ftz, class F>
F input(F x) {
    return ftz ? flush(x) : x;
}
template <bool ftz, class F>
F result(F x) {
    return canonical(input<ftz>(x));
}

// max and min of a number and NaN return the number. -0 is less than +0.
template <class F>
F larger(F a, F b) {
    const F both = a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
    return a != a ? b : b != b ? a : both;
}
template <class F>
F smaller(F a, F b) {
    const F both = a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
    return a != a ? b : b != b ? a : both;
}

// .sat limits a result to [0, 1]; NaN becomes 0.
template <class F>
F saturated(F x) {
    return x > 0 ? (x < 1 ? x : F(1)) : F(0);
}

// Round the exact value `high + low` to float in one direction: round to nearest, then
// move one float up or down if the rest has the other sign.
enum class Rounding { ZERO, DOWN, UP };
inline f32 rounded(f64 high, f64 low, Rounding rounding) {
    const f32 near = f32(high);
    if (!std::isfinite(near)) return near;
    const f64 rest = (high - f64(near)) + low;  // the exact value minus `near`
    const bool down =
        rounding == Rounding::DOWN || (rounding == Rounding::ZERO && near > 0);
    if (rest < 0 && down) return std::nextafter(near, -INFINITY);
    const bool up =
        rounding == Rounding::UP || (rounding == Rounding::ZERO && near < 0);
    return rest > 0 && up ? std::nextafter(near, f32(INFINITY)) : near;
}
// The error of a sum of doubles is a double, which Knuth's TwoSum computes exactly.
inline f32 rounded_sum(f64 a, f64 b, Rounding rounding) {
    const f64 sum = a + b, of_b = sum - a;
    return rounded(sum, (a - (sum - of_b)) + (b - of_b), rounding);
}

// 2^x and log2(x), computed in double and rounded to float, without branches, so that
// g++ can vectorize them.
//
//   2^x = 2^n e^t,  n = x rounded to an integer,  t = (x - n) ln 2,  |t| <= 0.35
//
// Adding 1.5 * 2^52 leaves n in the low bits of a double. The Taylor series of e^t ends
// with t^10 / 10!. Adding n << 52 to the bits multiplies by 2^n.
inline f32 exp2_of(f32 x) {
    const f64 y = x < -200 ? -200.0 : x > 200 ? 200.0 : f64(x);
    const f64 shifted = y + 0x1.8p52, whole = shifted - 0x1.8p52,
              t = (y - whole) * M_LN2;
    f64 e = 1.0 / 3628800;  // 1 / 10!
    for (const f64 c : {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                        1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        e = __builtin_fma(e, t, c);
    const f64 scaled = double_of(bits(e) + (bits(shifted) << 52));
    return x != x ? x : f32(scaled);
}
//   log2 x = n + log2 m,  m in [sqrt(1/2), sqrt(2)),
//   ln m = 2 (t + t^3 / 3 + t^5 / 5 + …),  t = (m - 1) / (m + 1)
inline f32 log2_of(f32 x) {
    const f64 y = x;  // a subnormal float is a normal double
    const u64 shifted = bits(y) - 0x3fe6a09e00000000ull;  // the bits of sqrt(1/2)
    const s32 exponent = s32(u32(shifted >> 32)) >> 20;
    const f64 m = double_of((shifted & 0x000fffffffffffffull) + 0x3fe6a09e00000000ull);
    const f64 t = (m - 1) / (m + 1), square = t * t;
    f64 s = 1.0 / 17;
    for (const f64 c :
         {1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0})
        s = __builtin_fma(s, square, c);
    const f32 log = f32(exponent + s * t * (2 * M_LOG2E));
    const f32 special = x == 0            ? -INFINITY
                        : x > 0 || x != x ? x
                                          : NAN;  // infinity and NaN stay as they are
    return x > 0 && x < INFINITY ? log : special;
}

inline f32 from_half(u16 h) { return _cvtsh_ss(h); }
inline u16 to_half(f32 x) {
    return x == x ? _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT) : 0x7fff;
}
// A bfloat16 is the upper half of a float. Rounding to nearest, ties to even, adds
// 0x7fff, and 1 more if the bit that stays last is 1.
inline f32 from_bfloat(u16 b) { return float_of(u32(b) << 16); }
inline u16 to_bfloat(f32 x) {
    const u32 b = bits(x);
    return x == x ? u16((b + 0x7fff + (b >> 16 & 1)) >> 16) : 0x7fff;
}

// rcp.approx.ftz.f64 reads only the upper 32 bits of x and gives only the upper 32 bits
// of the result; the lower bits are 0.
inline f64 coarse_reciprocal(f64 x) {
    constexpr u64 UPPER = 0xffffffff00000000ull, EXPONENT = 0x7ff0000000000000ull;
    constexpr u64 SIGN = 1ull << 63;
    if (x != x) return double_of(0x7fffffff00000000ull);
    const u64 upper = bits(x) & UPPER;
    if (!(upper & EXPONENT)) return double_of((upper & SIGN) | EXPONENT);
    const u64 r = bits(1 / double_of(upper)) & UPPER;
    return double_of(r & EXPONENT ? r : r & SIGN);
}

// Convert a whole number to an integer type: values out of range become the nearest
// limit. NaN becomes 0, or 2^63 for f64 to 64 bits.
template <class I, class F>
I whole(F x) {
    constexpr bool top = sizeof(I) == 8 && sizeof(F) == 8;
    if (x != x) return top ? I(1ull << 63) : I(0);
    const F low = F(std::numeric_limits<I>::min()),
            high = F(std::numeric_limits<I>::max());
    return x <= low    ? std::numeric_limits<I>::min()
           : x >= high ? std::numeric_limits<I>::max()
                       : I(x);
}
