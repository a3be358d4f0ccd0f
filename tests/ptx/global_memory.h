// Global memory: which bytes are in bounds and written, and races within a launch.
//
// Two accesses to one element race if at least one writes and nothing orders them. Time
// is a counter that increases at each barrier, __syncwarp and fence. An earlier access
// is ordered before this one ("is past") if it was made
//   by the same thread;
//   by another lane of the warp, before a __syncwarp or a barrier of the block;
//   by another warp of the block, before a barrier of the block;
//   by another block, before a release that this warp has acquired.
//
// Release and acquire follow the memory consistency model of the PTX ISA. Release: a
// __threadfence, then an atomic or volatile write. Acquire: an atomic or volatile
// access to the same address, then a __threadfence. Both ends carry what they know of
// other blocks, so the order is transitive. Two atomic or volatile accesses never race.
// An atomic or volatile read is not recorded, so a later plain write does not race with
// it.
#pragma once
#include <memory>

#include "shared_memory.h"

// The last accesses to one element of an array: the writer, and the readers that are
// not past. Of several readers a cell keeps the lowest and the highest warp, and the
// time of the earliest read. A write must be ordered after every block between these
// two, which suits a barrier of blocks: they have consecutive numbers.
struct Cell {
    u32 writer = 0, written_at = 0, reader = 0, last_reader = 0, read_at = 0;
    u8 writer_lane = 0, reader_lane = 0;  // reader_lane may be MANY
    static constexpr u8 MANY = 0xFF;
};

// Memory that a launch may access. Python fills all fields except `cells`.
struct Range {
    u64 low, high;
    u8* written;   // for each byte 0xFF if a kernel wrote it; null: all are written
    u32 constant;  // a write is a fault
    u32 grain;     // bytes of an element
    Cell* cells;   // one for each element; null if races are impossible
};

// What a warp knows of one block: the accesses of all its warps before time `barrier`,
// and the accesses of warp `warp` before time `warp_at`. A full vector clock would have
// one time for each warp. Of two warps of a block this keeps only the later release. So
// an ordered access may be reported as a race, but not the reverse.
struct Past {
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

// The time of a launch, and what its releases have published.
struct Clocks {
    u32 now = 1;
    std::unordered_map<u64, Pasts> released;  // by the address of the atomic
};

// What one warp knows about the accesses of all others.
struct Observer {
    u32 block = 0, warp = 0;
    Clocks* clocks = nullptr;
    u32 barrier = 0;       // time of the block's last barrier
    u32 warp_barrier = 0;  // time of the warp's last __syncwarp
    Pasts known;           // what it knows of other blocks
    Pasts acquired;        // read by ordered accesses; known from the next fence on
    Pasts released;        // known at the last fence; ordered writes publish it
    bool fenced = false;   // a fence came before

    // The name of a warp in cells: 32 * block + warp + 1, as 0 stands for no warp. A
    // block has at most 32 warps. ATOMIC marks an atomic or volatile write.
    static constexpr u32 ATOMIC = 1u << 31;
    u32 name() const { return (block << 5 | warp) + 1; }

    // Check and record a read. `ordered`: by an atomic or volatile access.
    void read(Cell& cell, bool ordered, int lane) const {
        const u32 me = name();
        check_writer(cell, ordered, lane, "read");
        if (ordered) return;
        // Earlier readers that are past need no check again: this read replaces them.
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
    // Check and record a write. All earlier readers are past, so the cell forgets them.
    void write(Cell& cell, bool ordered, int lane) const {
        check_writer(cell, ordered, lane, "write");
        if (cell.reader && !are_past(cell, lane)) {
            const u32 other = cell.reader == name() ? cell.last_reader : cell.reader;
            fault("write", other, "read", lane);
        }
        cell = {name() | (ordered ? ATOMIC : 0), clocks->now};
        cell.writer_lane = u8(lane);
    }

    void pass_warp_barrier() { warp_barrier = ++clocks->now; }  // at a __syncwarp

    // __threadfence: complete an acquire, and prepare a release of all that this warp
    // knows, of all that its block did before the last barrier, and of its own
    // accesses.
    void fence() {
        join(known, acquired), acquired.clear();
        released = known;
        if (released.size() <= block) released.resize(block + 1);
        released[block] = {barrier, name(), ++clocks->now};
        fenced = true;
    }
    // An atomic or volatile access: read what is released at the address; if it writes,
    // publish the own release there.
    void synchronize(u64 address, bool writes) {
        Pasts& there = clocks->released[address];
        join(acquired, there);
        if (writes && fenced) join(there, released);
    }

  private:
    u32 block_of(u32 who) const { return (who - 1) >> 5; }

    // Return whether an access of warp `who` at time `at` is ordered before now.
    bool is_past(u32 who, u32 at, int its_lane, int lane) const {
        if (who == name())
            return its_lane == lane || at < std::max(barrier, warp_barrier);
        const u32 other = block_of(who);
        if (other == block) return at < barrier;
        if (other >= known.size()) return false;
        const Past& past = known[other];
        return at < past.barrier || (who == past.warp && at < past.warp_at);
    }
    // Return whether all readers of a cell are past.
    bool are_past(const Cell& cell, int lane) const {
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
        throw Fault(std::string("race in global memory: ") + now +
                        " of an element that " + where + " has " + before,
                    lane);
    }
};
