// The state of a launch: blocks, warps, and how an instruction reaches its operands.
#pragma once
#include <bit>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "global_memory.h"

struct Part {  // lanes of a warp that go together
    u32 pc, lanes;
};

struct Copy {  // a cp.async on its way
    u32 lane, target, bytes, group;
    u64 source;  // 0: zeros
};

// Registers hold 32 lanes, one after the other; narrow types lie in 4 bytes each.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;
template <class T>
T from_slot(Slot<T> slot) {
    T value;
    memcpy(&value, &slot, sizeof value);  // little-endian
    return value;
}
template <class T>
Slot<T> to_slot(T value) {
    if constexpr (sizeof(T) < 4) {
        std::make_unsigned_t<T> bits = value;
        return bits;
    } else {
        return std::bit_cast<Slot<T>>(value);
    }
}

template <class F>
void for_each_lane(u32 lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

struct Warp;

struct Block {
    u32 number = 0;
    SharedMemory shared;
    std::vector<Warp> warps;  // the first of them live in this launch
    u32 live_warps = 0;
};

using Memory = std::unique_ptr<u8, decltype(&free)>;

struct Launch {
    const Program* program = nullptr;
    u32 grid = 1, block = 1;  // blocks, and threads of each
    u32 shared_bytes = 0;     // static and dynamic
    u8* constants = nullptr;
    bool races = false;  // more than one warp runs
    std::vector<Range> ranges;
    std::vector<std::unique_ptr<Cell, decltype(&free)>> cells;
    std::vector<u32> last_range;  // of each instruction
    Clocks clocks;
    u64 progress = 0;  // rises with all that another warp can wait for
};

struct Warp {
    Launch* launch = nullptr;
    Block* block = nullptr;
    u32 number = 0;       // within the block
    u32 alive = 0;        // lanes that have not exited
    u32 first_alive = 0;  // lanes that there were
    u8* bases[2] = {};    // of registers and of constants
    std::vector<u32> predicate;
    Memory registers{nullptr, free};
    size_t register_bytes = 0;
    std::vector<u8> local;
    u32 local_bytes = 0;

    std::vector<Part> ready;    // diverged lanes, the smallest pc last
    std::vector<Part> waiting;  // at a barrier or for other lanes
    u32 pc = 0, active = 0;
    bool at_barrier = false, yields = false;

    std::vector<Copy> copies;
    u32 copy_group[LANES] = {};
    Observer observer;      // of races in global memory
    u32 carry[LANES] = {};  // of add.cc and the like

    template <class T>
    Slot<T>* at(u32 operand) {
        u8* base = bases[operand >> 31] + (operand & ~CONSTANT);
        return static_cast<Slot<T>*>(__builtin_assume_aligned(base, 64));
    }
    u32 mask(u32 operand) const {
        const u32 lanes = predicate[operand & ~NEGATED];
        return operand & NEGATED ? ~lanes : lanes;
    }
    void set(u32 operand, u32 lanes, u32 value) {
        u32& mask = predicate[operand];
        mask = (mask & ~lanes) | (value & lanes);
    }
    int thread(int lane) const { return number * LANES + lane; }

    // Compute f(lane) for some lanes. Lanes that have exited may be computed too: so
    // whole vectors are, wherever no living lane is elsewhere.
    template <class F>
    void each(u32 lanes, F f) const {
        if (lanes == alive) {
#pragma GCC ivdep
            for (int lane = 0; lane < LANES; ++lane) f(lane);
        } else {
            for_each_lane(lanes, f);
        }
    }
};
