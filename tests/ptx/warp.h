// The state of a launch: its blocks and warps, and the access to operands.
#pragma once
#include <bit>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "global_memory.h"

// Lanes of a warp that have the same program counter.
struct Part {
    u32 pc, lanes;
};

// A cp.async that its lane has not waited for. `group` counts the lane's commits.
struct Copy {
    u32 lane, target, bytes, group;
    u64 source;  // a host address; 0 stands for zeros
};

// A register stores the values of 32 lanes one after the other. A type of 1 or 2 bytes
// takes 4 bytes of each lane.
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
    std::vector<Warp> warps;  // a later launch may need only the first of them
    u32 live_warps = 0;       // the warps that this launch uses
};

using Memory = std::unique_ptr<u8, decltype(&free)>;

struct Launch {
    const Program* program = nullptr;
    u32 grid = 1, block = 1;  // number of blocks; threads of one block
    u32 shared_bytes = 0;     // static and dynamic
    u8* constants = nullptr;
    bool races = false;         // global races are checked: more than one warp runs
    std::vector<Range> ranges;  // sorted by address, without overlap
    std::vector<std::unique_ptr<Cell, decltype(&free)>> cells;
    std::vector<u32> last_range;  // of each instruction: the range that it used last
    Clocks clocks;
    u64 progress = 0;  // counts the events that another warp may wait for
};

struct Warp {
    Launch* launch = nullptr;
    Block* block = nullptr;
    u32 number = 0;       // within the block
    u32 alive = 0;        // lanes that have not exited
    u32 first_alive = 0;  // lanes at the start; the last warp of a block may have few
    u8* bases[2] = {};    // addresses of the registers and of the constants
    std::vector<u32> predicate;
    Memory registers{nullptr, free};
    size_t register_bytes = 0;
    std::vector<u8> local;
    u32 local_bytes = 0;

    // Every living lane is in `active`, in `ready` or in `waiting`.
    std::vector<Part> ready;    // diverged lanes, the smallest pc last
    std::vector<Part> waiting;  // lanes at a barrier or at a collective
    u32 pc = 0, active = 0;     // the lanes that run now, and their program counter
    bool at_barrier = false, yields = false;  // yields: it has read a volatile value

    std::vector<Copy> copies;
    u32 copy_group[LANES] = {};
    Observer observer;      // detects races in global memory
    u32 carry[LANES] = {};  // the carry flag of add.cc, sub.cc and mad.cc

    // The values of an operand: 32 lanes. The top bit of the operand selects the base.
    template <class T>
    Slot<T>* at(u32 operand) {
        u8* base = bases[operand >> 31] + (operand & ~CONSTANT);
        return static_cast<Slot<T>*>(__builtin_assume_aligned(base, 64));
    }
    // The lanes where a predicate is true.
    u32 mask(u32 operand) const {
        const u32 lanes = predicate[operand & ~NEGATED];
        return operand & NEGATED ? ~lanes : lanes;
    }
    void set(u32 operand, u32 lanes, u32 value) {
        u32& mask = predicate[operand];
        mask = (mask & ~lanes) | (value & lanes);
    }
    int thread(int lane) const { return number * LANES + lane; }

    // Compute f(lane) for some lanes. If these are all living lanes, exited lanes are
    // computed as well: nothing reads their results, and the loop can be vectorized.
    template <class F>
    void compute_lanes(u32 lanes, F f) const {
        if (lanes == alive) {
#pragma GCC ivdep
            for (int lane = 0; lane < LANES; ++lane) f(lane);
        } else {
            for_each_lane(lanes, f);
        }
    }
};
