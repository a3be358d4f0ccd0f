// The two 16-bit storage types, rounding to nearest even as the hardware does.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

namespace emulator {

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace emulator

inline __half __float2half_rn(float x) {
    const uint32_t sign = emulator::float_bits(x) >> 16 & 0x8000;
    uint32_t bits = emulator::float_bits(x) & 0x7fffffff;
    if (bits > 0x7f800000) {
        bits = 0x7fff;  // CUDA's NaN
    } else if (bits >= 0x477ff000) {
        bits = 0x7c00;  // 65520 and above round to infinity
    } else if (bits < 0x38800000) {
        // A subnormal half is a multiple of 2^-24, the spacing of floats from 0.5 on:
        // the addition rounds.
        bits = emulator::float_bits(emulator::bits_float(bits) + 0.5f) - 0x3f000000;
    } else {
        bits = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
    }
    return {static_cast<uint16_t>(sign | bits)};
}

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t rest = x.bits & 0x7fff;
    float magnitude;
    if (rest >= 0x7c00) {
        magnitude = emulator::bits_float(0x7f800000 | (rest & 0x3ff) << 13);
    } else if (rest < 0x400) {
        magnitude = float(rest) * 0x1p-24f;
    } else {
        magnitude = emulator::bits_float((rest << 13) + 0x38000000);
    }
    return emulator::bits_float(sign | emulator::float_bits(magnitude));
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = emulator::float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 x) {
    return emulator::bits_float(uint32_t(x.bits) << 16);
}
