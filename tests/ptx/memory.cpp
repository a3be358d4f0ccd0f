// Loads, stores, atomics, background copies (cp.async) and matrix loads (ldmatrix).
// Each of them first checks the addresses of all its lanes.
#include "memory.h"

#include "floats.h"

namespace {

// One access of a warp: the addresses of its lanes.
struct Access {
    alignas(64) u64 address[LANES];  // in its space; after the checks, of the host
    u32 lanes, bytes;                // bytes of one lane
    u64 low, high;                   // the range of all lanes; `high` is exclusive
    bool row;                        // all lanes access one row without gaps, in order
    Space space;

    Access(Warp& w, u32 lanes, u32 operand, s64 offset, u32 bytes, Space space,
           bool wide)
        : lanes(lanes), bytes(bytes), space(space) {
        if (wide) {
            const u64* from = w.at<u64>(operand);
            for (int l = 0; l < LANES; ++l) address[l] = from[l] + offset;
        } else {
            const u32* from = w.at<u32>(operand);
            for (int l = 0; l < LANES; ++l) address[l] = u32(from[l] + offset);
        }
        // Inactive lanes take the address of an active one: loops over 32 lanes then
        // need no mask.
        const u64 first = address[std::countr_zero(lanes)];
        if (lanes != ALL)
            for (int l = 0; l < LANES; ++l)
                address[l] = lanes >> l & 1 ? address[l] : first;
        if (space == GENERIC) leave_window();
        measure();
    }

    // Find the range of the access, and check that it is aligned to its size.
    void measure() {
        u64 bits = 0, gaps = 0;
        for (int l = 0; l < LANES; ++l) {
            bits |= address[l];
            gaps |= (address[l] - address[0]) ^ u64(bytes * l);
        }
        row = gaps == 0 && lanes == ALL;
        s64 lowest = s64(address[0]), highest = s64(address[LANES - 1]);
        if (!row)
            for (int l = 0; l < LANES; ++l) {
                const s64 a = s64(address[l]);
                lowest = std::min(lowest, a), highest = std::max(highest, a);
            }
        low = u64(lowest), high = u64(highest) + bytes;
        if (bits & (bytes - 1)) {
            int lane = 0;
            for_each_lane(lanes, [&](int l) {
                if (address[l] & (bytes - 1)) lane = l;
            });
            throw Fault("misaligned access of " + std::to_string(bytes) + " bytes at " +
                            hex(address[lane]),
                        lane);
        }
    }

    static std::string hex(u64 x) {
        char text[24];
        snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
        return text;
    }

  private:
    // Turn generic addresses into addresses of the memory whose window they lie in.
    void leave_window() {
        const auto space_of = [](u64 a) {
            return a >= LOCAL_WINDOW ? LOCAL : a >= SHARED_WINDOW ? SHARED : GLOBAL;
        };
        space = space_of(address[std::countr_zero(lanes)]);
        const u64 window = space == LOCAL    ? LOCAL_WINDOW
                           : space == SHARED ? SHARED_WINDOW
                                             : 0;
        for (u64& a : address) {
            if (space_of(a) != space)
                throw Unknown("lanes of one access in different memories");
            a -= window;
        }
    }
};

enum AccessType { READ, WRITE, ATOMIC };

// Return the range that contains the bytes from `low` to `high`, or null. `hint` is the
// range that the same instruction used last.
Range* find(Launch& launch, u32& hint, u64 low, u64 high) {
    const auto holds = [&](const Range& r) { return r.low <= low && high <= r.high; };
    if (hint < launch.ranges.size() && holds(launch.ranges[hint]))
        return &launch.ranges[hint];
    for (u32 i = 0; i < launch.ranges.size(); ++i)
        if (holds(launch.ranges[i])) return &launch.ranges[hint = i];
    return nullptr;
}

// Fault if no byte of an element was ever written: all are 0xFF and none is marked.
void check_never_written(const Range& range, u64 at, u32 bytes, int lane) {
    const u8* memory = reinterpret_cast<const u8*>(at);
    for (u32 i = 0; i < bytes; ++i)
        if (memory[i] != 0xFF || range.written[at - range.low + i]) return;
    throw Fault("read of global memory never written, at byte " +
                    std::to_string(at - range.low) + " of an array",
                lane);
}

// Check one lane's access to an array: constness, bytes never written, races.
void check_range(Warp& w, const Instruction& i, Range& range, u64 at, u32 bytes,
                 AccessType type, int lane) {
    if (type != READ && range.constant)
        throw Fault("write to constant memory, at byte " +
                        std::to_string(at - range.low) + " of an array",
                    lane);
    if (range.written) {
        // Fresh memory is 0xFF, so without such a byte there is nothing to look up. The
        // elements of a vector are checked one by one.
        if (type != WRITE && memchr(reinterpret_cast<void*>(at), 0xFF, bytes)) {
            const u32 element = std::min(bytes, range.grain);
            for (u32 n = 0; n < bytes; n += element)
                check_never_written(range, at + n, element, lane);
        }
        if (type != READ) memset(range.written + (at - range.low), 0xFF, bytes);
    }
    if (!range.cells) return;
    Cell* cell = range.cells + (at - range.low) / range.grain;
    for (u32 n = std::max(bytes / range.grain, 1u); n; --n, ++cell)
        type == READ ? w.observer.read(*cell, i.ordered, lane)
                     : w.observer.write(*cell, i.ordered, lane);
}

void check_global(Warp& w, const Instruction& i, Access& x, AccessType type) {
    Launch& launch = *w.launch;
    u32& hint = launch.last_range[&i - launch.program->code.data()];
    Range* range = find(launch, hint, x.low, x.high);
    // The fast path: one array contains all addresses, and nothing else needs a check.
    if (range && !range->written && !range->cells && (type == READ || !range->constant))
        return;
    for_each_lane(x.lanes, [&](int l) {
        const u64 at = x.address[l];
        Range* mine = range ? range : find(launch, hint, at, at + x.bytes);
        if (!mine)
            throw Fault(std::string(type == READ ? "read" : "write") + " of " +
                            std::to_string(x.bytes) + " bytes outside all arrays, at " +
                            nearest(launch, at),
                        l);
        check_range(w, i, *mine, at, x.bytes, type, l);
        if (i.ordered && launch.program->fences)
            w.observer.synchronize(at, type != READ);
    });
}

void check_bounds(const SharedMemory& shared, const Access& x) {
    if (s64(x.low) >= 0 && x.high <= shared.size()) return;
    for_each_lane(x.lanes, [&](int l) {
        const s64 at = s64(x.address[l]);
        if (at < 0 || at + x.bytes > shared.size())
            throw Fault("out of bounds: access to shared byte " + std::to_string(at) +
                            " of " + std::to_string(shared.size()),
                        l);
    });
}

void check_shared(Warp& w, Access& x, AccessType type) {
    SharedMemory& shared = w.block->shared;
    check_bounds(shared, x);
    const u32 low = u32(x.low);
    shared.touch(low, u32(x.high));
    // Try the whole row at once. If that is not possible or shows a problem, go lane by
    // lane, which names the fault.
    const bool done =
        x.row && (type == READ    ? shared.read_row(w.number, low, x.bytes)
                  : type == WRITE ? shared.write_row(w.number, low, x.bytes)
                                  : false);
    if (!done) {
        if (type == READ) shared.read(w.number, x.lanes, x.address, x.bytes);
        if (type == WRITE) shared.write(w.number, x.lanes, x.address, x.bytes);
        if (type == ATOMIC)
            for_each_lane(x.lanes, [&](int l) {
                shared.atomic(w.thread(l), u32(x.address[l]), x.bytes);
            });
    }
    const u64 base = reinterpret_cast<u64>(shared.bytes.data());
    for (u64& a : x.address) a += base;
}

// Check an access, and turn its addresses into host addresses.
void check(Warp& w, const Instruction& i, Access& x, AccessType type) {
    if (x.space == GLOBAL) return check_global(w, i, x, type);
    if (x.space == SHARED) return check_shared(w, x, type);
    if (s64(x.low) < 0 || x.high > w.local_bytes)
        throw Fault("out of bounds: access to local bytes " +
                        std::to_string(s64(x.low)) + " to " +
                        std::to_string(s64(x.high)) + " of " +
                        std::to_string(w.local_bytes),
                    std::countr_zero(x.lanes));
    // Every lane has local memory of its own.
    const u64 base = reinterpret_cast<u64>(w.local.data());
    for (int l = 0; l < LANES; ++l) x.address[l] += base + l * w.local_bytes;
    x.row = false;
}

template <class T>
T fetch(u64 at) {
    T value;
    memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
    return value;
}

// T is the type in memory; its sign decides how a narrow value is extended. Wide is the
// type in the register, of 4 or 8 bytes.
template <class T, class Wide, int count>
void load(Warp& w, const Instruction& i, u32 lanes) {
    Access x(w, lanes, i.o[count], i.offset, count * sizeof(T), i.space,
             i.wide_address);
    check(w, i, x, READ);
    if (i.ordered) w.yields = true;  // a loop around it may wait for another warp
    if constexpr (count == 1) {
        auto* d = w.at<Wide>(i.o[0]);
        if (x.row) {
            const T* from = reinterpret_cast<const T*>(x.address[0]);
            for (int l = 0; l < LANES; ++l) d[l] = to_slot<Wide>(Wide(from[l]));
            return;
        }
    }
    for (int n = 0; n < count; ++n) {
        auto* d = w.at<Wide>(i.o[n]);
        const auto move = [&](int l) {
            d[l] = to_slot<Wide>(Wide(fetch<T>(x.address[l] + n * sizeof(T))));
        };
        if (lanes == ALL)
            for (int l = 0; l < LANES; ++l) move(l);
        else
            for_each_lane(lanes, move);
    }
}

template <class T, class Wide, int count>
void store(Warp& w, const Instruction& i, u32 lanes) {
    Access x(w, lanes, i.o[0], i.offset, count * sizeof(T), i.space, i.wide_address);
    check(w, i, x, WRITE);
    ++w.launch->progress;
    if constexpr (count == 1)
        if (x.row) {
            T* to = reinterpret_cast<T*>(x.address[0]);
            const auto* s = w.at<Wide>(i.o[1]);
            for (int l = 0; l < LANES; ++l) to[l] = T(s[l]);
            return;
        }
    for_each_lane(lanes, [&](int l) {
        for (int n = 0; n < count; ++n) {
            const T value = T(w.at<Wide>(i.o[1 + n])[l]);
            memcpy(reinterpret_cast<void*>(x.address[l] + n * sizeof(T)), &value,
                   sizeof value);
        }
    });
}

// F takes the old value and two operands, and returns the new value. Lanes run one
// after the other.
template <class T, class F>
Form atomic(F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        Access x(w, lanes, i.o[1], i.offset, sizeof(T), i.space, i.wide_address);
        check(w, i, x, ATOMIC);
        ++w.launch->progress;
        for_each_lane(lanes, [&](int l) {
            const T old = fetch<T>(x.address[l]);
            const T b = from_slot<T>(w.at<T>(i.o[2])[l]);
            const T c = from_slot<T>(w.at<T>(i.o[i.operands - 1])[l]);
            const T now = F{}(old, b, c);
            memcpy(reinterpret_cast<void*>(x.address[l]), &now, sizeof now);
            w.at<T>(i.o[0])[l] = to_slot<T>(old);
        });
    };
    return {run, {}};
}
template <class T>
void add_atomics(Table& table, const std::string& type) {
    const auto add = [&](const char* name, Form form) {
        table["atom." + (name + type)] = form;
    };
    add("add.", atomic<T>([](T old, T b, T) { return T(old + b); }));
    add("min.", atomic<T>([](T old, T b, T) { return std::min(old, b); }));
    add("max.", atomic<T>([](T old, T b, T) { return std::max(old, b); }));
    add("exch.", atomic<T>([](T, T b, T) { return b; }));
    if constexpr (std::is_integral_v<T>) {
        add("and.", atomic<T>([](T old, T b, T) { return T(old & b); }));
        add("or.", atomic<T>([](T old, T b, T) { return T(old | b); }));
        add("xor.", atomic<T>([](T old, T b, T) { return T(old ^ b); }));
        add("cas.", atomic<T>([](T old, T b, T c) { return old == b ? c : old; }));
    }
}

// Start a background copy to shared memory. A lane copies all bytes or none; without a
// copy the target becomes zeros, and the source is not read. Until the lane waits for
// it, the target is 0xFF and any access to it is a fault.
void copy_async(Warp& w, const Instruction& i, u32 lanes) {
    Access to(w, lanes, i.o[0], i.offset, i.bytes, SHARED, i.wide_address);
    const u32* size = w.at<u32>(i.o[2]);
    u32 reading = 0;
    for_each_lane(lanes, [&](int l) {
        if (size[l] == i.bytes)
            reading |= 1u << l;
        else if (size[l] != 0)
            throw Fault("cp.async must read all of its bytes or none", l);
    });
    const u64* source = w.at<u64>(i.o[1]);
    if (reading) {
        Access from(w, reading, i.o[1], s32(i.target), i.bytes, GLOBAL, true);
        check_global(w, i, from, READ);
    }
    check_bounds(w.block->shared, to);
    SharedMemory& shared = w.block->shared;
    shared.touch(u32(to.low), u32(to.high));
    for_each_lane(lanes, [&](int l) {
        const u32 at = u32(to.address[l]);
        shared.start_copy(w.thread(l), at, i.bytes);
        memset(&shared.bytes[at], 0xFF, i.bytes);
        const u64 origin = reading >> l & 1 ? source[l] + s32(i.target) : 0;
        w.copies.push_back({u32(l), at, i.bytes, w.copy_group[l], origin});
    });
}
// Close the lane's current group of copies.
void copy_commit(Warp& w, const Instruction&, u32 lanes) {
    for_each_lane(lanes, [&](int l) { ++w.copy_group[l]; });
}
// Finish the copies of all groups except the latest `offset` ones; -1 stands for all
// copies. A copy writes its bytes here and not earlier.
void copy_wait(Warp& w, const Instruction& i, u32 lanes) {
    const auto arrives = [&](const Copy& copy) {
        if (!(lanes >> copy.lane & 1)) return false;
        if (i.offset >= 0 && copy.group + i.offset >= w.copy_group[copy.lane])
            return false;
        SharedMemory& shared = w.block->shared;
        shared.touch(copy.target, copy.target + copy.bytes);
        shared.end_copy(w.thread(copy.lane), copy.target, copy.bytes);
        if (copy.source)
            memcpy(&shared.bytes[copy.target],
                   reinterpret_cast<const void*>(copy.source), copy.bytes);
        else
            memset(&shared.bytes[copy.target], 0, copy.bytes);
        return true;
    };
    w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), arrives),
                   w.copies.end());
}

// ldmatrix loads 1, 2 or 4 matrices of 8 rows of 16 bytes (8 elements of 2 bytes). Lane
// 8 n + r has the address of row r of matrix n. Lane l receives elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4; with .trans, of column l / 4.
template <bool transposed>
void load_matrices(Warp& w, const Instruction& i, u32 lanes) {
    if (lanes != ALL)
        throw Fault("ldmatrix needs all lanes of the warp", std::countr_zero(lanes));
    const u32 rows = i.count == 4 ? ALL : (1u << 8 * i.count) - 1;
    Access x(w, rows, i.o[i.count], i.offset, 16, SHARED, i.wide_address);
    check_shared(w, x, READ);
    for (int n = 0; n < i.count; ++n) {
        auto* d = w.at<u32>(i.o[n]);
        for (int l = 0; l < LANES; ++l) {
            const u64* row = x.address + 8 * n;
            if (transposed)
                d[l] = fetch<u16>(row[l % 4 * 2] + l / 4 * 2) |
                       u32(fetch<u16>(row[l % 4 * 2 + 1] + l / 4 * 2)) << 16;
            else
                d[l] = fetch<u32>(row[l / 4] + l % 4 * 4);
        }
    }
}

void fence(Warp& w, const Instruction&, u32) {
    if (w.launch->races) w.observer.fence();
}
void warp_barrier(Warp& w, const Instruction&, u32) {
    w.block->shared.warp_barrier(w.number);
    if (w.launch->races) w.observer.pass_warp_barrier();
}

template <class T, class Wide>
Handler load_of(int count) {
    return count == 1   ? load<T, Wide, 1>
           : count == 2 ? load<T, Wide, 2>
                        : load<T, Wide, 4>;
}
template <class T, class Wide>
Handler store_of(int count) {
    return count == 1   ? store<T, Wide, 1>
           : count == 2 ? store<T, Wide, 2>
                        : store<T, Wide, 4>;
}

}  // namespace

std::string nearest(const Launch& launch, u64 at) {
    std::string best = Access::hex(at);
    u64 distance = 1 << 20;
    for (const Range& r : launch.ranges) {
        if (at >= r.high && at - r.high < distance) {
            distance = at - r.high;
            best = std::to_string(distance) + " bytes behind an array of " +
                   std::to_string(r.high - r.low);
        } else if (at < r.low && r.low - at < distance) {
            distance = r.low - at;
            best = std::to_string(distance) + " bytes before an array of " +
                   std::to_string(r.high - r.low);
        }
    }
    return best;
}

// Load 1 or 2 bytes to a register of 8 bytes.
static Handler narrow_loader(bool is_signed, int bytes) {
    if (bytes == 2) return is_signed ? load<s16, s64, 1> : load<u16, u64, 1>;
    return is_signed ? load<s8, s64, 1> : load<u8, u64, 1>;
}
Handler loader(bool is_signed, int bytes, int count, bool wide) {
    if (bytes == 8) return load_of<u64, u64>(count);
    if (bytes == 4)
        return !wide       ? load_of<u32, u32>(count)
               : is_signed ? load_of<s32, s64>(count)
                           : load_of<u32, u64>(count);
    if (wide && count == 1) return narrow_loader(is_signed, bytes);
    if (wide) throw Unknown("a narrow vector in registers of 8 bytes");
    if (bytes == 2)
        return is_signed ? load_of<s16, s32>(count) : load_of<u16, u32>(count);
    return is_signed ? load_of<s8, s32>(count) : load_of<u8, u32>(count);
}
Handler storer(int bytes, int count, bool wide) {
    if (bytes == 8) return store_of<u64, u64>(count);
    if (bytes == 4) return wide ? store_of<u32, u64>(count) : store_of<u32, u32>(count);
    if (wide) throw Unknown("a narrow store from a register of 8 bytes");
    return bytes == 2 ? store_of<u16, u32>(count) : store_of<u8, u32>(count);
}

void add_memory(Table& table) {
    add_atomics<u32>(table, "u32");
    add_atomics<s32>(table, "s32");
    add_atomics<u64>(table, "u64");
    add_atomics<s64>(table, "s64");
    for (const std::string name : {"and", "or", "xor", "exch", "cas"})
        for (const std::string width : {"32", "64"})
            table["atom." + name + ".b" + width] = table["atom." + name + ".u" + width];
    table["atom.add.f32"] = atomic<f32>([](f32 old, f32 b, f32) { return old + b; });
    table["atom.add.f64"] = atomic<f64>([](f64 old, f64 b, f64) { return old + b; });
    table["cp.async"] = {copy_async, {}};
    table["cp.async.commit_group"] = {copy_commit, {}};
    table["cp.async.wait_group"] = {copy_wait, {}};
    table["ldmatrix"] = {load_matrices<false>, {}};
    table["ldmatrix.trans"] = {load_matrices<true>, {}};
    table["membar"] = {fence, {}};
    table["bar.warp.sync"] = {warp_barrier, {}};
}
