// Global memory: bounds, bytes never written, and races within a launch.
//
// Time is a counter that rises at each barrier and each release. An access of another
// warp lies in the past if it came before a barrier of the same block; or, for another
// block, before a release that this one has acquired: __threadfence and an atomic
// there, an atomic or volatile access to the same address and __threadfence here. Of
// another lane of the same warp, before a __syncwarp.
#pragma once
#include <memory>

#include "shared_memory.h"

// One element of an array: who used it last, and when. Of several readers, the first
// and the last by number are kept (blocks that wait for each other are neighbours), and
// when the earliest read: a grid's barrier then makes all of them past.
struct Cell {
    u32 writer = 0, written_at = 0, reader = 0, last_reader = 0, read_at = 0;
    u8 writer_lane = 0, reader_lane = 0;  // or MANY
    static constexpr u8 MANY = 0xFF;
};

struct Range {  // memory that a launch may reach; the first five come from Python
    u64 low, high;
    u8* written;   // a byte for each, 0xFF where the GPU ever wrote; null: all are
    u32 constant;  // may not be written
    u32 grain;     // bytes of an element
    Cell* cells;   // null where no race can be
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
    std::unordered_map<u64, Pasts> released;  // by the address of an atomic
};

// The view of one warp.
struct Observer {
    u32 block = 0, warp = 0;
    Clocks* clocks = nullptr;
    u32 barrier = 0;  // the time of the block's last one, and the warp's
    u32 warp_barrier = 0;
    Pasts known;     // of other blocks
    Pasts acquired;  // known from the next fence on
    Pasts released;  // what a fence made ready for atomics to publish
    bool fenced = false;

    // A warp is named by its block and its number there, of at most 32.
    static constexpr u32 ATOMIC = 1u << 31;
    u32 name() const { return (block << 5 | warp) + 1; }

    void read(Cell& cell, bool ordered, int lane) const {
        const u32 me = name();
        check_writer(cell, ordered, lane, "read");
        if (ordered) return;
        if (cell.reader == 0 || are_past(cell, lane)) {
            cell.reader = cell.last_reader = me;
            cell.reader_lane = u8(lane);
            cell.read_at = clocks->now;
        } else {
            if (cell.reader_lane != lane) cell.reader_lane = Cell::MANY;
            cell.reader = std::min(cell.reader, me);
            cell.last_reader = std::max(cell.last_reader, me);
        }
    }
    void write(Cell& cell, bool ordered, int lane) const {
        check_writer(cell, ordered, lane, "write");
        if (cell.reader && !are_past(cell, lane)) {
            const u32 other = cell.reader == name() ? cell.last_reader : cell.reader;
            fault("write", other, "read", lane);
        }
        cell = {name() | (ordered ? ATOMIC : 0), clocks->now};
        cell.writer_lane = u8(lane);
    }

    void meet() { warp_barrier = ++clocks->now; }  // at a __syncwarp

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
    u32 block_of(u32 who) const { return (who - 1) >> 5; }

    bool is_past(u32 who, u32 at, int its_lane, int lane) const {
        if (who == name())
            return its_lane == lane || at < std::max(barrier, warp_barrier);
        const u32 other = block_of(who);
        if (other == block) return at < barrier;
        if (other >= known.size()) return false;
        const Past& past = known[other];
        return at < past.barrier || (who == past.warp && at < past.warp_at);
    }
    bool are_past(const Cell& cell, int lane) const {  // its readers
        if (cell.reader == cell.last_reader)
            return is_past(cell.reader, cell.read_at, cell.reader_lane, lane);
        for (u32 other = block_of(cell.reader); other <= block_of(cell.last_reader);
             ++other) {
            const bool past = other == block ? cell.read_at < barrier
                                             : other < known.size() &&
                                                   cell.read_at < known[other].barrier;
            if (!past) return false;
        }
        return true;
    }
    void check_writer(const Cell& cell, bool ordered, int lane, const char* now) const {
        const u32 writer = cell.writer & ~ATOMIC;
        if (writer == 0 || (ordered && cell.writer & ATOMIC)) return;
        if (!is_past(writer, cell.written_at, cell.writer_lane, lane))
            fault(now, writer, "written", lane);
    }
    [[noreturn]] void fault(const char* now, u32 who, const char* before,
                            int lane) const {
        const u32 other = block_of(who);
        const std::string where = who == name()    ? "another lane of the warp"
                                  : other == block ? "another warp of the block"
                                                   : "block " + std::to_string(other);
        throw Fault(std::string("race in global memory: ") + now + " of what " + where +
                        " has " + before,
                    lane);
    }
};
