// A block of CUDA threads as fibres in one OS thread.
//
// A fibre runs until it waits at a barrier, then gives way to the next that can run.
// A barrier that some thread never reaches is noticed when nobody can run, and every
// arrival must come from the same source line. Blocks run one after another; those of a
// cooperative launch are all there from the beginning, and give way to each other where
// they wait for each other. Under ThreadSanitizer each fibre is a
// thread of its own, and only barriers order them, so a race is reported whether or not
// it happens to do harm; deterministic, and much faster than OS threads.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __x86_64__
// Save the callee-saved registers on this stack, keep its pointer, take up the other.
asm(R"(
    .text
    .type switch_stack, @function
switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void switch_stack(void** from, void* to);
#else
#error "the emulator switches stacks in x86-64 assembly"
#endif

#ifdef __SANITIZE_THREAD__
#define UNSEEN __attribute__((no_sanitize("thread")))  // the emulator's own state
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
#define UNSEEN
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
#else
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 : uint3 {};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

// Every `__shared__` variable lies in this section, so that it can be poisoned.
extern "C" unsigned char __start_qm_shared[] __attribute__((weak));
extern "C" unsigned char __stop_qm_shared[] __attribute__((weak));

namespace emulator {

struct Barrier {
    const char *what, *file;
    int line;
    unsigned arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    alignas(16) unsigned char slots[2][32][64];  // what each lane shows the others
};

struct AsyncCopy {
    void* target;
    const void* source;
    size_t bytes;
};

struct Fibre {
    void* stack_pointer;
    std::unique_ptr<char[]> stack;
    void* tsan;
    uint3 index;
    Barrier* waits_for;
    unsigned generation;
    bool finished;
    std::vector<std::vector<AsyncCopy>> copies;  // cp.async: one list per group
};

constexpr size_t stack_bytes = 256 << 10;

struct Block {
    uint3 index;
    std::vector<Fibre> fibres;
    std::vector<Warp> warps;
    std::vector<unsigned char> dynamic_bytes;
    Barrier barrier;
    unsigned current, stopped;  // stopped = waiting or finished
};

static std::vector<Block> blocks;  // one, or all of a cooperative launch
static Block* block;               // the one that runs
static unsigned finished_blocks, idle_yields;
static std::function<void()> thread_body;
static Fibre outside;
static char failure[512];

UNSEEN inline void switch_to(Fibre& from, Fibre& to) {
    threadIdx = to.index;
    blockIdx = block->index;
    if (from.finished) __tsan_release(&outside);
    __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch itself orders nothing
    switch_stack(&from.stack_pointer, to.stack_pointer);
}

UNSEEN inline void fail(const char* message, const char* file, int line) {
    std::snprintf(failure, sizeof failure,
                  "%s:%d: %s (block %u %u %u, thread %u %u %u)", file, line, message,
                  blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                  threadIdx.z);
    switch_to(block->fibres[block->current], outside);
}

// Go on with the next block that has not finished, from where it gave way.
UNSEEN inline void run_another_block() {
    Fibre& from = block->fibres[block->current];
    if (finished_blocks == blocks.size()) return switch_to(from, outside);
    do {
        block = block == &blocks.back() ? &blocks.front() : block + 1;
    } while (block->stopped == block->fibres.size());
    if (&from != &block->fibres[block->current])
        switch_to(from, block->fibres[block->current]);
}

UNSEEN inline void run_another() {
    auto& fibres = block->fibres;
    unsigned& current = block->current;
    if (block->stopped == fibres.size()) {
        unsigned finished = 0;
        for (const Fibre& f : fibres) finished += f.finished;
        if (finished == fibres.size()) {
            ++finished_blocks;
            return run_another_block();
        }
        for (current = 0; fibres[current].finished;) ++current;
        threadIdx = fibres[current].index;
        const Barrier& barrier = *fibres[current].waits_for;
        char message[200];
        std::snprintf(message, sizeof message,
                      "not all threads reach %s: %u wait here, %u have returned",
                      barrier.what, barrier.arrived, finished);
        fail(message, barrier.file, barrier.line);
    }
    Fibre& from = fibres[current];
    for (;;) {
        current = current + 1 == fibres.size() ? 0 : current + 1;
        const Fibre& f = fibres[current];
        if (f.finished) continue;
        if (!f.waits_for || f.generation != f.waits_for->generation) break;
    }
    fibres[current].waits_for = nullptr;
    if (&from != &fibres[current]) switch_to(from, fibres[current]);
}

// Wait until `expected` threads have come to the barrier.
UNSEEN inline void arrive(Barrier& barrier, unsigned expected, const char* what,
                          const char* file, int line) {
    if (barrier.arrived == 0) {
        barrier.what = what, barrier.file = file, barrier.line = line;
    } else if (barrier.line != line || std::strcmp(barrier.what, what) != 0) {
        char message[200];
        std::snprintf(message, sizeof message,
                      "%s while other threads are at %s in line %d", what, barrier.what,
                      barrier.line);
        fail(message, file, line);
    }
    if (++barrier.arrived == expected) {
        block->stopped -= expected - 1;
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    Fibre& self = block->fibres[block->current];
    self.waits_for = &barrier;
    self.generation = barrier.generation;
    ++block->stopped;
    run_another();
}

UNSEEN inline void blocks_move_on() { idle_yields = 0; }

// Let the other blocks run while this thread waits for them.
UNSEEN inline void give_way(const char* file, int line) {
    if (++idle_yields > 2 * blocks.size())
        fail("waits for blocks that never come", file, line);
    run_another_block();
}

// Show `mine` to the other lanes; returns what all 32 show. Orders no memory.
template <class T>
UNSEEN const T (&exchange(const T& mine, const char* what, const char* file,
                          int line))[32] {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) % 16 == 0);
    static_assert(sizeof(T) <= 64);
    if (block->fibres.size() % 32)
        fail("a collective in a warp that is not full", file, line);
    Warp& warp = block->warps[block->current / 32];
    unsigned char* slots = warp.slots[warp.barrier.generation & 1][0];
    std::memcpy(slots + block->current % 32 * sizeof(T), &mine, sizeof(T));
    arrive(warp.barrier, 32, what, file, line);
    return *reinterpret_cast<const T(*)[32]>(slots);
}

UNSEEN inline unsigned lane() { return block->current % 32; }
UNSEEN inline Fibre& self() { return block->fibres[block->current]; }

UNSEEN inline void fibre_main() {
    __tsan_acquire(&outside);
    thread_body();
    self().finished = true;
    ++block->stopped;
    run_another();
}

// Garbage that is a NaN in every floating type and an absurd index in every integer.
UNSEEN __attribute__((no_sanitize("address"))) inline void poison(
    volatile unsigned char* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) bytes[i] = 0xff;
}

// Set the running block to the start of its threads.
UNSEEN inline void prepare(uint3 index) {
    block->index = index;
    block->barrier = {};
    block->current = block->stopped = 0;
    poison(block->dynamic_bytes.data(), block->dynamic_bytes.size());
    for (Warp& warp : block->warps) warp.barrier = {};
    for (Fibre& f : block->fibres) {
        // Six registers to pop, the address to return to, and a stack that is aligned
        // as after a call.
        const auto top = reinterpret_cast<uintptr_t>(f.stack.get() + stack_bytes);
        __asan_unpoison_memory_region(f.stack.get(), stack_bytes);  // it never returned
        void** frame = reinterpret_cast<void**>(top & ~uintptr_t(15)) - 8;
        std::memset(frame, 0, 8 * sizeof(void*));
        frame[6] = reinterpret_cast<void*>(fibre_main);
        f.stack_pointer = frame;
        f.waits_for = nullptr, f.finished = false;
        f.copies.clear();
    }
}

// Run the blocks that are prepared, from the first thread of the first.
UNSEEN inline void run_blocks() {
    poison(__start_qm_shared, size_t(__stop_qm_shared - __start_qm_shared));
    block = blocks.data();
    finished_blocks = idle_yields = 0;
    __tsan_release(&outside);
    switch_to(outside, block->fibres[0]);
    __tsan_acquire(&outside);
}

inline const char* launch(std::function<void()> body, const unsigned* grid,
                          const unsigned* size, size_t shared_bytes, bool cooperative) {
    gridDim = {{grid[0], grid[1], grid[2]}};
    blockDim = {{size[0], size[1], size[2]}};
    thread_body = std::move(body);
    failure[0] = 0;
    if (cooperative && __stop_qm_shared - __start_qm_shared > 0)
        return "blocks that run at once take their shared memory from dynamic_shared()";
    const unsigned threads = size[0] * size[1] * size[2];
    const size_t num_blocks = size_t(grid[0]) * grid[1] * grid[2];
    outside.tsan = __tsan_get_current_fiber();
    blocks = std::vector<Block>(cooperative ? num_blocks : 1);
    for (Block& b : blocks) {
        b.dynamic_bytes = std::vector<unsigned char>(shared_bytes);  // exact, for ASan
        b.warps = std::vector<Warp>((threads + 31) / 32);
        b.fibres = std::vector<Fibre>(threads);
        for (unsigned t = 0; t < threads; ++t) {
            b.fibres[t].stack.reset(new char[stack_bytes]);
            b.fibres[t].tsan = __tsan_create_fiber(0);
            b.fibres[t].index = {t % size[0], t / size[0] % size[1],
                                 t / size[0] / size[1]};
        }
    }
    for (size_t i = 0; i < num_blocks && !failure[0]; ++i) {
        block = &blocks[cooperative ? i : 0];
        prepare({unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]),
                 unsigned(i / grid[0] / grid[1])});
        if (!cooperative || i + 1 == num_blocks) run_blocks();
    }
    for (Block& b : blocks)
        for (Fibre& f : b.fibres) __tsan_destroy_fiber(f.tsan);
    blocks.clear();
    return failure[0] ? failure : nullptr;
}

}  // namespace emulator
