// The PTX-backed functions of common.cuh, lane by lane as the PTX ISA lays them out.
#pragma once

#include <vector>

#include "block.h"
#include "half.h"

// What `extern __shared__` is to a kernel: `shared_mem` bytes.
inline unsigned char* dynamic_shared() { return emulator::block->dynamic_bytes.data(); }

namespace emulator {

inline float widen(__half, uint16_t bits) { return __half2float({bits}); }
inline float widen(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }
// TF32 has 13 bits less than a float; the hardware is taken to drop them, though PTX
// leaves open what it makes of them.
inline float widen(float, uint32_t bits) { return bits_float(bits & ~0u << 13); }

struct Fragments {
    unsigned a[4], b[2], unused[2];
};

}  // namespace emulator

// mma.sync.aligned.m16n8k16.row.col: c (16 x 8, f32) += a (16 x 16) * b (16 x 8), or
// m16n8k8 for TF32.
template <class T>
void mma_16x8(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],
              const unsigned (&b)[2], T type, HERE) {
    constexpr unsigned packed = 4 / sizeof(T);  // elements of one register
    const emulator::Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {}};
    const auto& lanes = emulator::exchange(mine, "mma", file, line);
    float* const c[] = {&c0, &c1, &c2, &c3};
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = emulator::lane() / 4 + i / 2 * 8;
        const unsigned column = emulator::lane() % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 8 * packed; ++k) {
            // a: register (row >= 8) + 2 (k in the second half) of lane
            // (row % 8) * 4 + k / packed % 4.
            const unsigned shift = k % packed * 16, half = k / packed / 4;
            const auto& left = lanes[row % 8 * 4 + k / packed % 4];
            const auto& right = lanes[column * 4 + k / packed % 4];
            sum += emulator::widen(type, left.a[row / 8 + half * 2] >> shift) *
                   emulator::widen(type, right.b[half] >> shift);
        }
        *c[i] += sum;
    }
}

// ldmatrix.sync.aligned.m8n8.x4: lane 8 i + r gives the address of row r of matrix i;
// register i of every lane receives two neighbours of row lane / 4 of matrix i.
inline void ldmatrix_x4(unsigned (&d)[4], const void* row, HERE) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
        emulator::fail("ldmatrix of a row that is not aligned to 16 bytes", file, line);
    const auto& rows = emulator::exchange(row, "ldmatrix", file, line);
    for (unsigned i = 0; i < 4; ++i) {
        const auto* words =
            static_cast<const unsigned*>(rows[i * 8 + emulator::lane() / 4]);
        d[i] = words[emulator::lane() % 4];
    }
}

// cp.async: the copy happens as late as allowed, at the wait, and until then the target
// is poison: a missing wait shows.
template <int bytes>
void cp_async(void* target, const void* source, HERE) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    const auto addresses =
        reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
    if (addresses % bytes)
        emulator::fail("cp.async that is not aligned to its size", file, line);
    std::memset(target, 0xff, bytes);
    auto& groups = emulator::self().copies;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({target, source, bytes});
}

inline void cp_async_commit() {
    auto& groups = emulator::self().copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

// Wait until at most `pending` of the committed groups are still in flight.
template <int pending>
void cp_async_wait() {
    auto& groups = emulator::self().copies;
    while (groups.size() > pending + 1) {
        for (const emulator::AsyncCopy& copy : groups.front())
            std::memcpy(copy.target, copy.source, copy.bytes);
        groups.erase(groups.begin());
    }
}
