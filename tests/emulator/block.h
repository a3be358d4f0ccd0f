// A block of CUDA threads as fibres in one OS thread.
//
// A fibre runs until it waits at a barrier, then gives way to the next that can run.
// A barrier that some thread never reaches is noticed when nobody can run, and every
// arrival must come from the same source line. Under ThreadSanitizer each fibre is a
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

static std::vector<Fibre> fibres;
static std::vector<Warp> warps;
static std::vector<unsigned char> dynamic_bytes;
static std::function<void()> thread_body;
static Barrier block_barrier;
static unsigned current, stopped;  // stopped = waiting or finished
static Fibre outside;
static char failure[512];

UNSEEN inline void switch_to(Fibre& from, Fibre& to) {
    threadIdx = to.index;
    if (from.finished) __tsan_release(&outside);
    __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch itself orders nothing
    switch_stack(&from.stack_pointer, to.stack_pointer);
}

UNSEEN inline void fail(const char* message, const char* file, int line) {
    std::snprintf(failure, sizeof failure,
                  "%s:%d: %s (block %u %u %u, thread %u %u %u)", file, line, message,
                  blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                  threadIdx.z);
    switch_to(fibres[current], outside);
}

UNSEEN inline void run_another() {
    if (stopped == fibres.size()) {
        unsigned finished = 0;
        for (const Fibre& f : fibres) finished += f.finished;
        if (finished == fibres.size()) return switch_to(fibres[current], outside);
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
        stopped -= expected - 1;
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    Fibre& self = fibres[current];
    self.waits_for = &barrier;
    self.generation = barrier.generation;
    ++stopped;
    run_another();
}

// Show `mine` to the other lanes; returns what all 32 show. Orders no memory.
template <class T>
UNSEEN const T (&exchange(const T& mine, const char* what, const char* file,
                          int line))[32] {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) % 16 == 0);
    static_assert(sizeof(T) <= 64);
    if (fibres.size() % 32) fail("a collective in a warp that is not full", file, line);
    Warp& warp = warps[current / 32];
    unsigned char* slots = warp.slots[warp.barrier.generation & 1][0];
    std::memcpy(slots + current % 32 * sizeof(T), &mine, sizeof(T));
    arrive(warp.barrier, 32, what, file, line);
    return *reinterpret_cast<const T(*)[32]>(slots);
}

UNSEEN inline unsigned lane() { return current % 32; }
UNSEEN inline Fibre& self() { return fibres[current]; }

UNSEEN inline void fibre_main() {
    __tsan_acquire(&outside);
    thread_body();
    fibres[current].finished = true;
    ++stopped;
    run_another();
}

// Garbage that is a NaN in every floating type and an absurd index in every integer.
UNSEEN __attribute__((no_sanitize("address"))) inline void poison(
    volatile unsigned char* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) bytes[i] = 0xff;
}

UNSEEN inline void run_block() {
    poison(__start_qm_shared, size_t(__stop_qm_shared - __start_qm_shared));
    poison(dynamic_bytes.data(), dynamic_bytes.size());
    block_barrier = {};
    for (Warp& warp : warps) warp.barrier = {};
    for (Fibre& f : fibres) {
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
    current = stopped = 0;
    __tsan_release(&outside);
    switch_to(outside, fibres[0]);
    __tsan_acquire(&outside);
}

inline const char* launch(std::function<void()> body, const unsigned* grid,
                          const unsigned* block, size_t shared_bytes) {
    gridDim = {{grid[0], grid[1], grid[2]}};
    blockDim = {{block[0], block[1], block[2]}};
    thread_body = std::move(body);
    failure[0] = 0;
    dynamic_bytes = std::vector<unsigned char>(shared_bytes);  // exact, for ASan
    const unsigned threads = block[0] * block[1] * block[2];
    warps = std::vector<Warp>((threads + 31) / 32);
    fibres = std::vector<Fibre>(threads);
    outside.tsan = __tsan_get_current_fiber();
    for (unsigned t = 0; t < threads; ++t) {
        fibres[t].stack.reset(new char[stack_bytes]);
        fibres[t].tsan = __tsan_create_fiber(0);
        fibres[t].index = {t % block[0], t / block[0] % block[1],
                           t / block[0] / block[1]};
    }
    for (unsigned z = 0; z < grid[2] && !failure[0]; ++z)
        for (unsigned y = 0; y < grid[1] && !failure[0]; ++y)
            for (unsigned x = 0; x < grid[0] && !failure[0]; ++x) {
                blockIdx = {x, y, z};
                run_block();
            }
    for (Fibre& f : fibres) __tsan_destroy_fiber(f.tsan);
    fibres.clear();
    dynamic_bytes.clear();
    return failure[0] ? failure : nullptr;
}

}  // namespace emulator
