// Global memory: bounds, bytes never written, and races between warps of a launch.
//
// Time is a counter that rises at each barrier and each release. An access of another
// warp lies in the past if it came before a barrier of the same block; or, for another
// block, before a release that this one has acquired: __threadfence and an atomic there,
// an atomic or volatile access to the same address and __threadfence here.
#pragma once
#include <memory>

#include "shared_memory.h"

struct Cell {  // one element of an array: who used it last, and when
    u32 writer = 0, written_at = 0, reader = 0, read_at = 0;
};

struct Range {  // memory that a launch may reach; the first five come from Python
    u64 low, high;
    u8* written;    // a byte for each, 0xFF where the GPU ever wrote; null: all are
    u32 constant;   // may not be written
    u32 grain;      // bytes of an element
    Cell* cells;    // null where no race can be
};

struct Past {  // what a warp knows of a block: all before its barrier, or of one warp
    u32 barrier = 0, warp = 0, warp_at = 0;
    void join(const Past& other) {
        barrier = std::max(barrier, other.barrier);
        if (other.warp_at > warp_at) warp = other.warp, warp_at = other.warp_at;
    }
};
using Pasts = std::vector<Past>;  // one for each block
inline void join(Pasts& pasts, const Pasts& others) {
    if (pasts.size() < others.size()) pasts.resize(others.size());
    for (size_t i = 0; i < others.size(); ++i) pasts[i].join(others[i]);
}

struct Clocks {  // of a launch
    u32 now = 1;
    u32 warps = 1;  // of a block
    std::unordered_map<u64, Pasts> released;  // by the address of an atomic
};

// The view of one warp.
struct Observer {
    u32 block = 0, warp = 0;
    Clocks* clocks = nullptr;
    u32 barrier = 0;   // the time of the block's last one
    Pasts known;       // of other blocks
    Pasts acquired;    // known from the next fence on
    Pasts released;    // what a fence made ready for atomics to publish
    bool fenced = false;

    // A warp is named by its number in the grid, + 1. More than one: of a block, or any.
    static constexpr u32 ATOMIC = 1u << 31, MANY = 1u << 30, ANYONE = MANY | (MANY - 1);
    u32 name() const { return block * clocks->warps + warp + 1; }

    bool is_past(u32 who, u32 at) const {
        if (who & MANY) {
            if (who == (MANY | block)) return at < barrier;
            if (who != ANYONE) return knows((who & ~MANY), 0, at);
            bool all = !known.empty() && at < barrier;
            for (u32 i = 0; i < known.size(); ++i) all = all && (i == block || knows(i, 0, at));
            return all;
        }
        const u32 other = (who - 1) / clocks->warps;
        return other == block ? at < barrier : knows(other, who, at);
    }

    void read(Cell& cell, bool ordered, int lane) const {
        const u32 me = name();
        if (const u32 writer = cell.writer & ~ATOMIC; writer && writer != me) {
            const bool both = ordered && cell.writer & ATOMIC;
            if (!both && !is_past(writer, cell.written_at)) fault("read", writer, "written", lane);
        }
        if (ordered) return;
        if (cell.reader && cell.reader != me && !is_past(cell.reader, cell.read_at)) {
            const bool same = block_of(cell.reader) == block;
            cell.reader = same ? MANY | block : ANYONE;
        } else {
            cell.reader = me;
        }
        cell.read_at = clocks->now;
    }
    void write(Cell& cell, bool ordered, int lane) const {
        const u32 me = name();
        if (const u32 writer = cell.writer & ~ATOMIC; writer && writer != me) {
            const bool both = ordered && cell.writer & ATOMIC;
            if (!both && !is_past(writer, cell.written_at)) fault("write", writer, "written", lane);
        }
        if (cell.reader && cell.reader != me && !is_past(cell.reader, cell.read_at))
            fault("write", cell.reader, "read", lane);
        cell = {me | (ordered ? ATOMIC : 0), clocks->now, 0, 0};
    }

    void fence() {
        join(known, acquired), acquired.clear();
        released = known;
        if (released.size() <= block) released.resize(block + 1);
        released[block] = {barrier, name(), ++clocks->now};
        fenced = true;
    }
    void synchronize(u64 address, bool writes) {  // an atomic or volatile access
        Pasts& there = clocks->released[address];
        join(acquired, there);
        if (writes && fenced) join(there, released);
    }

  private:
    bool knows(u32 other, u32 who, u32 at) const {
        if (other >= known.size()) return false;
        const Past& past = known[other];
        return at < past.barrier || (who && who == past.warp && at < past.warp_at);
    }
    u32 block_of(u32 who) const {
        if (who == ANYONE) return ~0u;
        return who & MANY ? who & ~MANY : (who - 1) / clocks->warps;
    }
    [[noreturn]] void fault(const char* now, u32 who, const char* before, int lane) const {
        const u32 other = block_of(who);
        const std::string name = other == ~0u    ? "other blocks have"
                                 : other == block ? "another warp of the block has"
                                                  : "block " + std::to_string(other) + " has";
        throw Fault(std::string("race in global memory: ") + now + " of what " + name + " " + before, lane);
    }
};
