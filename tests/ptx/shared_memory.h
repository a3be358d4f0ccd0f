// Shared memory of a block, and a record of its accesses since the last barrier.
//
// Two accesses to one byte race if at least one writes and no barrier lies between them
// (between warps), or no __syncwarp (between lanes of a warp).
//
// One bit stands for one byte, so a `u64` stands for a line of 64 bytes. Bits are
// enough to detect races between warps: each warp records what it read and wrote, the
// block records what any warp did, and the difference is what other warps did. Races
// within a warp also need the lane: it is recorded once for each grain, the unit of the
// narrowest access in the kernel.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "program.h"

// An error of the kernel that a GPU would not report, or that would make it hang.
struct Fault : std::runtime_error {
    Fault(const std::string& what, int lane) : runtime_error(what), lane(lane) {}
    int lane;
};

// The accesses of one warp to a line: since the barrier, and (`just`) since its last
// __syncwarp.
struct WarpLine {
    u64 read = 0, written = 0, just_read = 0, just_written = 0;
};

// The accesses of all warps to a line since the barrier. `read_by_many`: by two or more
// warps.
struct BlockLine {
    u64 read = 0, read_by_many = 0, written = 0, atomic = 0;
};

class SharedMemory {
  public:
    std::vector<u8> bytes;

    // Start a block: all bytes are 0xFF and not written.
    void reset(u32 size, u32 grain, u32 warps) {
        const u32 lines = (size + 63) / 64;
        if (size == size_ && warps == warps_.size()) {
            barrier();  // clears the lines in use
        } else {
            block_.assign(lines, {});
            warps_.assign(warps, std::vector<WarpLine>(lines));
        }
        size_ = size, grain_ = std::countr_zero(grain);
        low_ = lines, high_ = 0;
        bytes.assign(lines * 64, 0xFF);  // NaN
        defined_.assign(lines, 0), flying_.assign(lines, 0);
        reader_.resize(lines * 64 >> grain_), writer_.resize(lines * 64 >> grain_);
    }
    u32 size() const { return size_; }

    // Note the range of an access. Barriers clear only lines in the noted ranges.
    void touch(u32 low, u32 high) {
        low_ = std::min(low_, low / 64), high_ = std::max(high_, (high - 1) / 64 + 1);
    }

    // A barrier of the block: earlier accesses cannot race with later ones.
    void barrier() {
        if (low_ >= high_) return;
        std::fill(&block_[low_], &block_[high_ - 1] + 1, BlockLine{});
        for (auto& lines : warps_)
            std::fill(&lines[low_], &lines[high_ - 1] + 1, WarpLine{});
        low_ = u32(block_.size()), high_ = 0;
    }

    // A __syncwarp of one warp.
    void warp_barrier(u32 warp) {
        for (u32 i = low_; i < high_; ++i)
            warps_[warp][i].just_read = warps_[warp][i].just_written = 0;
    }

    // Check and record a read of `size` bytes by each of some lanes.
    void read(u32 warp, u32 lanes, const u64* addresses, u32 size) {
        WarpLine* lines = warps_[warp].data();
        for (; lanes; lanes &= lanes - 1) {
            const u32 lane = std::countr_zero(lanes), thread = warp * LANES + lane;
            const u32 address = u32(addresses[lane]), line = address / 64;
            const u64 mask = mask_of(address, size);
            WarpLine& mine = lines[line];
            if (!read_line(mine, line, mask)) explain_read(thread, mine, line, mask);
            note_reader(u16(thread), mine, address, size, mask);
        }
    }
    void write(u32 warp, u32 lanes, const u64* addresses, u32 size) {
        for (; lanes; lanes &= lanes - 1) {
            const u32 lane = std::countr_zero(lanes);
            write(warp * LANES + lane, u32(addresses[lane]), size);
        }
    }
    void write(u32 thread, u32 address, u32 size) {
        const u64 mask = mask_of(address, size);
        const u32 line = address / 64;
        WarpLine& mine = warps_[thread / LANES][line];
        if (!write_line(mine, line, mask)) explain_write(thread, mine, line, mask);
        for (u32 n = size >> grain_, at = address >> grain_; n; --n)
            writer_[at++] = u16(thread);
        mine.just_written |= mask;
    }

    // The fast path: all lanes of a warp read `size` bytes each, in one row. Return
    // false and record nothing if a byte may be a problem; `read` then checks lane by
    // lane.
    bool read_row(u32 warp, u32 address, u32 size) {
        return row(warp, address, size,
                   [&](WarpLine& mine, u32 line, u64 mask) {
                       return !(mine.just_read & mask) && !(mine.just_written & mask) &&
                              (problems_of_read(mine, line) & mask) == 0;
                   }) &&
               record_row(warp, address, size, reader_,
                          [&](WarpLine& mine, u32 line, u64 mask) {
                              read_line(mine, line, mask);
                              mine.just_read |= mask;
                          });
    }
    bool write_row(u32 warp, u32 address, u32 size) {
        return row(warp, address, size,
                   [&](WarpLine& mine, u32 line, u64 mask) {
                       return !(mine.just_read & mask) && !(mine.just_written & mask) &&
                              (problems_of_write(mine, line) & mask) == 0;
                   }) &&
               record_row(warp, address, size, writer_,
                          [&](WarpLine& mine, u32 line, u64 mask) {
                              write_line(mine, line, mask);
                              mine.just_written |= mask;
                          });
    }

    void atomic(u32 thread, u32 address, u32 size) {
        const u64 mask = mask_of(address, size);
        const u32 line = address / 64;
        const WarpLine& mine = warps_[thread / LANES][line];
        if (mask & ~defined_[line])
            fault(thread, "atomic on shared bytes never written");
        // Atomics do not race with atomics, but with plain accesses of other warps.
        const BlockLine& all = block_[line];
        const u64 others =
            (all.written & ~mine.written) | (all.read & ~mine.read) | all.read_by_many;
        if (mask & (flying_[line] | others))
            fault(thread,
                  "race in shared memory: atomic on bytes that another warp used");
        block_[line].atomic |= mask;
    }

    // A background copy writes its target twice: at its start, when the target becomes
    // undefined, and at its end, when its thread has waited for it.
    void start_copy(u32 thread, u32 address, u32 size) {
        write(thread, address, size);
        defined_[address / 64] &= ~mask_of(address, size);
        flying_[address / 64] |= mask_of(address, size);
    }
    void end_copy(u32 thread, u32 address, u32 size) {
        flying_[address / 64] &= ~mask_of(address, size);
        write(thread, address, size);
    }

  private:
    static constexpr u16 MANY = 0x8000;  // flag of a reader: other lanes read it too

    // The bits of `size` bytes of a line. An aligned access lies within one line.
    static u64 mask_of(u32 address, u32 size) {
        return ((size >= 64 ? 0 : 1ull << size) - 1) << address % 64;
    }

    // The bytes that this warp may not read: undefined ones, and those that another
    // warp wrote or an atomic changed since the barrier.
    u64 problems_of_read(const WarpLine& mine, u32 line) const {
        return ~defined_[line] | (block_[line].written & ~mine.written) |
               block_[line].atomic;
    }
    // The bytes that this warp may not write: targets of a copy, and those that another
    // warp or an atomic used since the barrier.
    u64 problems_of_write(const WarpLine& mine, u32 line) const {
        const BlockLine& all = block_[line];
        return flying_[line] | (all.written & ~mine.written) | (all.read & ~mine.read) |
               all.read_by_many | all.atomic;
    }

    // Record an access. Return false if it may be a fault; `explain` then decides.
    bool read_line(WarpLine& mine, u32 line, u64 mask) {
        BlockLine& all = block_[line];
        const bool good = !(mask & (problems_of_read(mine, line) | mine.just_written));
        if (const u64 first = mask & ~mine.read) {
            all.read_by_many |= all.read & first;
            all.read |= first;
            mine.read |= first;
        }
        return good;
    }
    bool write_line(WarpLine& mine, u32 line, u64 mask) {
        const u64 problems = problems_of_write(mine, line);
        const bool good = !(mask & (problems | mine.just_written | mine.just_read));
        block_[line].written |= mask;
        mine.written |= mask;
        defined_[line] |= mask;
        return good;
    }

    // Record the lane of a read. A grain that two lanes read since the __syncwarp keeps
    // the last one and the flag MANY.
    void note_reader(u16 thread, WarpLine& mine, u32 address, u32 size, u64 mask) {
        u16* reader = &reader_[address >> grain_];
        const u32 grains = size >> grain_;
        const u64 again = mine.just_read & mask;
        mine.just_read |= mask;
        // Four grains at once, in the 16-bit parts of a word. `others` has MANY where a
        // part differs from this thread: in MANY itself, or in a lower bit, whose sum
        // with 0x7fff carries into MANY.
        if (again == mask && grains % 4 == 0) {
            constexpr u64 ONES = 0x0001000100010001ull;  // 1 in each part
            for (u32 i = 0; i < grains; i += 4) {
                u64 four;
                memcpy(&four, reader + i, sizeof four);
                const u64 differs = four ^ ONES * thread, low = ONES * (MANY - 1);
                const u64 others = (((differs & low) + low) | differs) & ONES * MANY;
                four = ONES * thread | others;
                memcpy(reader + i, &four, sizeof four);
            }
            return;
        }
        for (u32 i = 0; i < grains; ++i) {
            const bool before = again >> (address + (i << grain_)) % 64 & 1;
            reader[i] = before && reader[i] != thread ? thread | MANY : thread;
        }
    }

    // Call f for each line of a row, until one call returns false.
    template <class F>
    bool row(u32 warp, u32 address, u32 size, F f) {
        const u32 end = address + size * LANES;
        for (u32 at = address; at < end;) {
            const u32 stop = std::min(end, at / 64 * 64 + 64);
            if (!f(warps_[warp][at / 64], at / 64, mask_of(at, stop - at)))
                return false;
            at = stop;
        }
        return true;
    }
    // Record a row without a problem: the lane of each grain, and with f the bits.
    template <class F>
    bool record_row(u32 warp, u32 address, u32 size, std::vector<u16>& threads, F f) {
        const u32 grains = size >> grain_;
        u16* thread = &threads[address >> grain_];
        for (int lane = 0; lane < LANES; ++lane)
            for (u32 i = 0; i < grains; ++i) *thread++ = u16(warp * LANES + lane);
        return row(warp, address, size, [&](WarpLine& mine, u32 line, u64 mask) {
            f(mine, line, mask);
            return true;
        });
    }

    // Throw the fault of an access, if it is one. An access to bytes that the same lane
    // used is not a fault.
    void explain_read(u32 thread, const WarpLine& mine, u32 line, u64 mask) {
        if (mask & flying_[line])
            fault(thread,
                  "read of shared bytes whose cp.async has not been waited for");
        if (mask & ~defined_[line]) fault(thread, "read of shared bytes never written");
        if (mask & block_[line].atomic)
            fault(thread,
                  "race in shared memory: read of bytes that an atomic changed");
        if (mask & block_[line].written & ~mine.written)
            fault(thread,
                  "race in shared memory: read of bytes that another warp wrote");
        if (others(writer_, thread, mine.just_written & mask, line))
            fault(thread,
                  "race in shared memory: read of bytes that another lane wrote");
    }
    void explain_write(u32 thread, const WarpLine& mine, u32 line, u64 mask) {
        const BlockLine& all = block_[line];
        if (mask & flying_[line])
            fault(thread,
                  "write to shared bytes whose cp.async has not been waited for");
        if (mask & all.atomic)
            fault(thread,
                  "race in shared memory: write to bytes that an atomic changed");
        const u32 me = thread / LANES;
        for (u32 warp = 0; warp < warps_.size(); ++warp) {
            if (warp == me) continue;
            if (mask & warps_[warp][line].written)
                fault(thread,
                      "race in shared memory: write to bytes that another warp wrote");
            if (mask & warps_[warp][line].read)
                fault(thread,
                      "race in shared memory: write to bytes that another warp read");
        }
        if (others(writer_, thread, mine.just_written & mask, line))
            fault(thread,
                  "race in shared memory: write to bytes that another lane wrote");
        if (others(reader_, thread, mine.just_read & mask, line))
            fault(thread,
                  "race in shared memory: write to bytes that another lane read");
    }

    // Return whether another thread is recorded for any of these bytes.
    bool others(const std::vector<u16>& threads, u32 thread, u64 mask, u32 line) const {
        for (; mask; mask &= mask - 1)
            if (threads[(line * 64 + std::countr_zero(mask)) >> grain_] != thread)
                return true;
        return false;
    }

    [[noreturn]] static void fault(u32 thread, const char* what) {
        throw Fault(what, thread % LANES);
    }

    u32 size_ = 0, grain_ = 2;           // bytes; log2 of the grain
    std::vector<u64> defined_, flying_;  // bytes written; targets of unfinished copies
    std::vector<BlockLine> block_;
    std::vector<std::vector<WarpLine>> warps_;
    std::vector<u16> reader_, writer_;  // the last thread, for each grain
    u32 low_ = 0, high_ = 0;            // range of lines used since the barrier
};
