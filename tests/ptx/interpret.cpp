// Runs a launch.
//
// Lanes: lanes with equal program counters run together. Of several diverged groups,
// the one with the smallest program counter runs first, so that it can reach the other
// groups and join them.
// Warps: a warp runs until its next barrier, or until it has made many backward
// branches (it may wait for another warp). Then the next warp of the block runs.
// Blocks: one after the other. In a cooperative launch, blocks may wait for each other,
// so all of them take turns.
#include <cstdlib>
#include <mutex>
#include <utility>

#include "memory.h"

namespace {

// Limits in backward branches of the whole launch, which count iterations of loops:
// for a turn of a warp, without any progress (waiting cannot end), and in total (the
// launch does not end).
constexpr u64 TURN = 1 << 16, IDLE = 20'000'000, LIMIT = 500'000'000;
constexpr u64 POLL = 1000;  // an iteration with a volatile load counts so many times

// Why a warp stops for now.
enum Outcome { DONE, AT_BARRIER, YIELDED };

// The launch, its backward branches so far, and both counts at the last progress.
struct State {
    Launch launch;
    u64 branches = 0, idle = 0, last_progress = 0;
};

// Describe an instruction and its source line, for messages.
std::string location_of(const Program& p, const Instruction* i) {
    const size_t n = i - p.code.data();
    const auto file = p.files.find(p.source_files[n]);
    std::string text = file == p.files.end() ? "line " : file->second + ":";
    text += std::to_string(p.source_lines[n]);
    return text + ", `" + p.texts[n] + "` (PTX line " + std::to_string(p.lines[n]) +
           ")";
}

// Continue with the group of diverged lanes that has the smallest program counter.
void resume(Warp& w) {
    if (w.ready.empty()) return;
    w.pc = w.ready.back().pc, w.active = w.ready.back().lanes;
    w.ready.pop_back();
}
// Add lanes to the ready groups, which are sorted: the largest pc first. A group with
// the same pc takes the lanes in.
void suspend(Warp& w, u32 pc, u32 lanes) {
    if (!lanes) return;
    size_t n = w.ready.size();
    while (n && w.ready[n - 1].pc < pc) --n;
    if (n && w.ready[n - 1].pc == pc)
        w.ready[n - 1].lanes |= lanes;
    else
        w.ready.insert(w.ready.begin() + n, {pc, lanes});
}
// Call this after the program counter has moved: join a ready group at the same pc, or
// let a group with a smaller pc run first.
void reconverge(Warp& w) {
    if (w.ready.empty() || w.pc < w.ready.back().pc) return;
    suspend(w, w.pc, w.active);
    resume(w);
}

// Remove the lanes that wait at an instruction, and return them.
u32 take_waiting(Warp& w, u32 pc) {
    u32 lanes = 0;
    std::erase_if(w.waiting, [&](const Part& part) {
        if (part.pc == pc) lanes |= part.lanes;
        return part.pc == pc;
    });
    return lanes;
}

// Run a collective instruction for every member mask whose living lanes are all here.
// Lanes of one call may have different masks, which form independent groups. Lanes of
// an incomplete group wait.
void run_collective(Warp& w, const Instruction& i, u32 lanes) {
    const u32* members = w.at<u32>(i.o[i.operands - 1]);
    const u32 pc = w.pc;
    const u32 first = members[std::countr_zero(lanes)];
    bool same = true;
    for_each_lane(lanes, [&](int l) { same = same && members[l] == first; });
    if (same && (first & w.alive) == lanes) {  // the common case: one complete group
        i.run(w, i, lanes);
        w.pc = pc + 1;
        return reconverge(w);
    }
    lanes |= take_waiting(w, pc);
    w.active = 0;
    while (lanes) {
        const int l = std::countr_zero(lanes);
        const u32 wanted = members[l];
        u32 group = 0;
        for_each_lane(lanes, [&](int k) { group |= u32(members[k] == wanted) << k; });
        if (group & ~wanted) throw Fault("a lane is not in its own member mask", l);
        if (group == (wanted & w.alive)) {
            i.run(w, i, group);
            suspend(w, pc + 1, group);
        } else {
            w.waiting.push_back({pc, group});
        }
        lanes &= ~group;
    }
    resume(w);
}

// Branch for some of the active lanes. Return false if the warp yields now.
bool branch(Warp& w, const Instruction& i, u32 lanes, State& state) {
    const u32 from = w.pc;
    if (lanes == w.active) {
        w.pc = i.target;
    } else if (lanes) {
        suspend(w, from + 1, w.active & ~lanes);
        w.pc = i.target, w.active = lanes;
    } else {
        ++w.pc;
    }
    reconverge(w);
    if (!lanes || i.target > from) return true;
    // A backward branch: one more iteration of a loop.
    const bool polls = std::exchange(w.yields, false);
    state.branches += polls ? POLL : 1;
    return !polls && state.branches % TURN != 0;
}

// End some of the active lanes.
void leave(Warp& w, u32 lanes) {
    for (const Copy& copy : w.copies)
        if (lanes >> copy.lane & 1)
            throw Fault("the thread exits before it has waited for its cp.async",
                        copy.lane);
    w.alive &= ~lanes, w.active &= ~lanes, ++w.pc;
    ++w.launch->progress;
    if (!w.active)
        resume(w);
    else
        reconverge(w);
}

// Arrive at a block barrier. Return true if all living lanes of the warp are here.
bool arrive(Warp& w, u32 lanes) {
    if (lanes != w.active)
        throw Fault("a barrier under a predicate that is false in some lanes",
                    std::countr_zero(w.active));
    lanes |= take_waiting(w, w.pc);
    w.active = lanes;
    if (lanes == w.alive) return w.at_barrier = true;
    w.waiting.push_back({w.pc, lanes});
    w.active = 0;
    resume(w);
    return false;
}

// Run a warp until it ends, reaches a barrier or yields. `i` is the current
// instruction, which a fault names.
Outcome run(Warp& w, State& state, const Instruction*& i) {
    const Instruction* code = w.launch->program->code.data();
    for (;;) {
        if (!w.active) {
            if (!w.alive) return DONE;
            // No lane can run, but some wait: a collective is incomplete.
            const Part& part = w.waiting.front();
            i = code + part.pc;
            const u32 gone = std::popcount(~w.alive & w.first_alive);
            throw Fault(
                "lanes wait here for other lanes that never arrive" +
                    (gone ? ": " + std::to_string(gone) + " have returned" : ""),
                std::countr_zero(part.lanes));
        }
        i = code + w.pc;
        if (const u32 count = i->straight) {  // straight-line code needs no checks
            const u32 lanes = w.active;
            for (const Instruction* end = i + count; i != end; ++i)
                i->run(w, *i, lanes);
            --i;
            w.pc += count;
            reconverge(w);
            continue;
        }
        const u32 lanes = w.active & w.mask(i->guard);
        switch (i->flow) {
            case PLAIN:
                if (lanes) i->run(w, *i, lanes);
                ++w.pc;
                reconverge(w);
                break;
            case BRANCH:
                if (!branch(w, *i, lanes, state)) return YIELDED;
                break;
            case EXIT:
                leave(w, lanes);
                break;
            case BARRIER:
                if (arrive(w, lanes)) return AT_BARRIER;
                break;
            case COLLECTIVE:
                suspend(w, w.pc + 1, w.active & ~lanes);
                if (lanes)
                    run_collective(w, *i, lanes);
                else
                    w.active = 0, resume(w);
                break;
        }
    }
}

// Enlarge a block of memory if it is too small. New memory is 64-byte aligned zeros.
u8* grow(Memory& memory, size_t& size, size_t wanted) {
    if (size < wanted) {
        size = (wanted + 4095) / 4096 * 4096;
        memory.reset(static_cast<u8*>(aligned_alloc(64, size)));
        memset(memory.get(), 0, size);
    }
    return memory.get();
}

// Prepare a block for its first instruction. Memory of an earlier block is used again.
void start_block(Block& block, Launch& launch, u32 number) {
    const Program& p = *launch.program;
    const u32 warps = (launch.block + LANES - 1) / LANES;
    block.number = number;
    if (block.warps.size() < warps) block.warps.resize(warps);
    block.live_warps = warps;
    block.shared.reset(launch.shared_bytes, p.shared_grain, warps);
    for (u32 n = 0; n < warps; ++n) {
        Warp& w = block.warps[n];
        w.launch = &launch, w.block = &block, w.number = n;
        const u32 threads = std::min<u32>(launch.block - n * LANES, LANES);
        w.alive = w.active = w.first_alive =
            threads == LANES ? ALL : (1u << threads) - 1;
        w.pc = 0, w.at_barrier = w.yields = false;
        w.ready.clear(), w.waiting.clear(), w.copies.clear();
        w.bases[0] = grow(w.registers, w.register_bytes, p.register_bytes);
        w.bases[1] = launch.constants;
        w.predicate.assign(p.predicates, 0);
        w.predicate[TRUE_PREDICATE] = ALL;
        w.local_bytes = p.local_bytes;
        w.local.assign(size_t(p.local_bytes) * LANES, 0xFF);  // NaN
        w.observer = {};
        w.observer.block = number, w.observer.warp = n,
        w.observer.clocks = &launch.clocks;
        w.observer.barrier = launch.clocks.now;
        for (int l = 0; l < LANES; ++l) {
            w.at<u32>(p.thread_register)[l] = w.thread(l);
            w.at<u32>(p.block_register)[l] = number;
            w.at<u32>(p.warp_register)[l] = n;
        }
    }
}

// All warps of a block wait at a barrier or have ended: check that all threads are at
// the same barrier, and let them pass.
void release(Block& block, Launch& launch, const Instruction*& i, Warp*& at) {
    const Program& p = *launch.program;
    u32 here = 0, pc = ~0u;
    for (u32 n = 0; n < block.live_warps; ++n) {
        Warp& w = block.warps[n];
        if (!w.at_barrier) continue;
        at = &w, i = &p.code[w.pc];
        here += std::popcount(w.alive);
        if (pc != ~0u && pc != w.pc)
            throw Fault(
                "barrier while other threads are at " + location_of(p, &p.code[pc]),
                std::countr_zero(w.alive));
        pc = w.pc;
    }
    if (here != launch.block)
        throw Fault("not all threads reach the barrier: " + std::to_string(here) +
                        " wait here, " + std::to_string(launch.block - here) +
                        " have returned",
                    std::countr_zero(at->alive));
    // Accesses before this time are ordered before all that the block does next. The
    // warps also share what they have acquired from other blocks.
    const u32 now = ++launch.clocks.now;
    ++launch.progress;
    if (launch.program->fences && launch.races) {
        Pasts known;
        for (u32 n = 0; n < block.live_warps; ++n)
            join(known, block.warps[n].observer.known);
        for (u32 n = 0; n < block.live_warps; ++n)
            block.warps[n].observer.known = known;
    }
    block.shared.barrier();
    for (u32 n = 0; n < block.live_warps; ++n) {
        Warp& w = block.warps[n];
        w.observer.barrier = now;
        w.at_barrier = false;
        ++w.pc;
    }
}

// Run each warp of a block once. Return false if the block has ended.
bool run_turn(Block& block, State& state, const Instruction*& i, Warp*& at) {
    Launch& launch = state.launch;
    bool alive = false, waiting = true;
    for (u32 n = 0; n < block.live_warps; ++n) {
        Warp& w = block.warps[n];
        at = &w;
        if (w.alive && !w.at_barrier && run(w, state, i) == YIELDED) waiting = false;
        alive = alive || w.alive;
    }
    if (alive && waiting) release(block, launch, i, at);
    // Progress is a store, an atomic, an exit or a barrier. Loops without any of these
    // wait for a value that does not change.
    if (launch.progress != state.last_progress)
        state.last_progress = launch.progress, state.idle = state.branches;
    if (state.branches - state.idle > IDLE)
        throw Fault(
            "waits for a value that no running thread writes: does a block never run?",
            0);
    if (state.branches > LIMIT) throw Fault("the launch does not end", 0);
    return alive;
}

// Write the arguments and the launch size into the constants, for all 32 lanes.
void fill_constants(const Program& p, Launch& launch, const u8* arguments) {
    for (const LaunchConstant& c : p.launch_constants) {
        u64 value = c.source == LaunchConstant::BLOCK_SIZE ? launch.block : launch.grid;
        if (c.source == LaunchConstant::PARAMETER) {
            value = 0;
            memcpy(&value, arguments + c.parameter_at, c.bytes);
        }
        u8* to = launch.constants + (c.constant & ~CONSTANT);
        for (int l = 0; l < LANES; ++l) memcpy(to + l * c.bytes, &value, c.bytes);
    }
}

// Set the memory that the launch may access: arrays and global variables. Arrays may
// overlap (views of one array): their ranges become one. Races are recorded in one cell
// for each element, of the narrowest type in the range.
void set_ranges(const Program& p, Launch& launch, const Range* ranges, u32 count) {
    std::vector<Range> all(ranges, ranges + count);
    for (const Variable& v : p.globals) {
        const u64 low = (reinterpret_cast<u64>(v.value.data()) + 255) / 256 * 256;
        all.push_back({low, low + v.bytes, nullptr, 1, 1, nullptr});
    }
    std::sort(all.begin(), all.end(),
              [](const Range& a, const Range& b) { return a.low < b.low; });
    for (const Range& r : all) {
        if (launch.ranges.empty() || r.low >= launch.ranges.back().high) {
            launch.ranges.push_back(r);
            continue;
        }
        Range& last = launch.ranges.back();
        last.high = std::max(last.high, r.high);
        last.constant = last.constant && r.constant;
        last.grain = std::min(last.grain, r.grain);
    }
    for (Range& r : launch.ranges) {
        if (r.constant || !launch.races) continue;
        r.cells =
            static_cast<Cell*>(calloc((r.high - r.low) / r.grain + 1, sizeof(Cell)));
        launch.cells.emplace_back(r.cells, free);
    }
}

// A kernel that is ready to launch. Its constants are in aligned memory.
struct Loaded {
    Program program;
    Memory constants{nullptr, free};
    size_t constant_bytes = 0;
};

// Write an error message for Python; return 1, which reports a failure.
int write_message(char* message, u64 room, const std::string& text) {
    strncpy(message, text.c_str(), room - 1);
    message[room - 1] = 0;
    return 1;
}

}  // namespace

// The interface that build.py declares to Python. A function that fails writes a
// message and returns null or 1.
extern "C" {

void* ptx_module(const char* text, u64 size, char* message, u64 room) {
    try {
        return new std::shared_ptr<const Module>(read_module({text, size}));
    } catch (const std::exception& error) {
        write_message(message, room, error.what());
        return nullptr;
    }
}

void* ptx_kernel(const void* module, const char* kernel, char* message, u64 room) {
    try {
        auto loaded = std::make_unique<Loaded>();
        const auto& from_text =
            *static_cast<const std::shared_ptr<const Module>*>(module);
        loaded->program = decode(*from_text, kernel);
        const auto& from = loaded->program.constants;
        u8* to = grow(loaded->constants, loaded->constant_bytes, from.size());
        memcpy(to, from.data(), from.size());
        return loaded.release();
    } catch (const std::exception& error) {
        write_message(message, room, error.what());
        return nullptr;
    }
}

void ptx_facts(const void* kernel, u32* shared_bytes, u32* max_threads,
               u32* parameters) {
    const Program& p = static_cast<const Loaded*>(kernel)->program;
    *shared_bytes = p.shared_bytes, *max_threads = p.max_threads;
    *parameters = u32(p.parameters.size());
}
void ptx_parameter(const void* kernel, u32 n, u32* at, u32* bytes) {
    const Parameter& parameter =
        static_cast<const Loaded*>(kernel)->program.parameters[n];
    *at = parameter.at, *bytes = parameter.bytes;
}

int ptx_launch(void* kernel, u32 grid, u32 block, u32 dynamic_bytes, int cooperative,
               const u8* arguments, const Range* ranges, u32 num_ranges, char* message,
               u64 room) {
    static std::mutex one_at_a_time;
    static std::vector<std::unique_ptr<Block>> blocks;  // reused by the next launch
    const std::lock_guard lock(one_at_a_time);
    Loaded& loaded = *static_cast<Loaded*>(kernel);
    const Program& p = loaded.program;
    State state;
    Launch& launch = state.launch;
    launch.program = &p, launch.grid = grid, launch.block = block;
    launch.shared_bytes = p.shared_bytes + dynamic_bytes;
    launch.constants = loaded.constants.get();
    launch.races = grid > 1 || block > LANES;
    launch.last_range.resize(p.code.size());
    fill_constants(p, launch, arguments);
    set_ranges(p, launch, ranges, num_ranges);
    const Instruction* i = p.code.data();
    Warp* at = nullptr;
    try {
        const u32 resident = cooperative ? grid : 1;  // blocks that run at once
        while (blocks.size() < resident) blocks.push_back(std::make_unique<Block>());
        for (u32 first = 0; first < grid; first += resident) {
            for (u32 n = 0; n < resident; ++n)
                start_block(*blocks[n], launch, first + n);
            std::vector<bool> ended(resident);
            for (u32 left = resident; left;)
                for (u32 n = 0; n < resident; ++n)
                    if (!ended[n] && !run_turn(*blocks[n], state, i, at))
                        ended[n] = true, --left;
        }
        return 0;
    } catch (const Fault& fault) {
        return write_message(message, room,
                             p.name + ": " + fault.what() + "; " + location_of(p, i) +
                                 ", block " + std::to_string(at->block->number) +
                                 ", thread " + std::to_string(at->thread(fault.lane)));
    } catch (const std::exception& error) {
        return write_message(message, room,
                             p.name + ": " + error.what() + "; " + location_of(p, i));
    }
}
}
