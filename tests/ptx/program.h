// A kernel as the interpreter stores it: decoded instructions, constants, and sizes.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;  // mask of all lanes of a warp

// Generic addresses. A global address is a host address. Shared and local memory have
// windows of addresses far above all host addresses.
constexpr u64 SHARED_WINDOW = 1ull << 60, LOCAL_WINDOW = 1ull << 61;
enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL };

// An operand is the byte offset of the values of 32 lanes, of 4 or 8 bytes each. With
// this bit it points to the constants of the program, without it to the registers of
// the warp.
constexpr u32 CONSTANT = 1u << 31;
// A predicate register is one mask of lanes, named by its index. This bit negates it.
// Index UNUSED_PREDICATE takes results that no instruction reads.
constexpr u32 NEGATED = 1u << 31;
enum { TRUE_PREDICATE, UNUSED_PREDICATE, FIRST_PREDICATE };

struct Warp;
struct Instruction;
// The function that executes an instruction for a mask of lanes.
using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

enum Flow : u8 {
    PLAIN,       // continues with the next instruction
    BRANCH,      // continues at `target`
    EXIT,        // ends its lanes
    BARRIER,     // waits for all threads of the block
    COLLECTIVE,  // waits for the lanes of a member mask, which is the last operand
};

struct Instruction {
    Handler run = nullptr;
    s64 offset = 0;              // added to an address; the groups of a cp.async wait
    u32 o[14] = {};              // operands: results first
    u32 guard = TRUE_PREDICATE;  // predicate that selects the lanes which run it
    u32 target = 0;              // of a branch; the second offset of cp.async
    u32 straight = 0;  // plain unguarded instructions from this one to the next label
    Flow flow = PLAIN;
    Space space = GENERIC;
    u8 bytes = 0;              // of one element
    u8 count = 1;              // elements of a vector
    u8 operands = 0;           // number of operands
    bool wide_address = true;  // the address has 8 bytes, not 4
    bool ordered = false;      // volatile or atomic: two such accesses never race
};

// The operands of an instruction: the bytes of each, 0 for a predicate.
struct Form {
    Handler run = nullptr;
    std::vector<int> bytes;
    bool lanewise = false;
};
using Table = std::unordered_map<std::string, Form>;
// All instructions by mnemonic, without ".rn": round to nearest is the default.
const Table& instructions();

struct Unknown : std::runtime_error {
    using runtime_error::runtime_error;
};

struct Parameter {
    std::string name;
    u32 at = 0, bytes = 0;  // offset and size in the block of arguments
};

// A constant that every launch fills: an argument of the kernel, or a launch size.
struct LaunchConstant {
    enum Source { PARAMETER, BLOCK_SIZE, GRID_SIZE } source;
    u32 constant, parameter_at = 0, bytes = 4;
};

// A variable in global or constant memory, and its initial value.
struct Variable {
    u64 align = 1, bytes = 0;
    std::vector<u8> value;
};

struct Program {
    std::string name;
    std::vector<Instruction> code;
    std::vector<u8> constants;  // a launch uses an aligned copy
    std::vector<LaunchConstant> launch_constants;
    std::vector<Parameter> parameters;
    u32 parameter_bytes = 0;  // of the whole block of arguments
    u32 register_bytes = 0, predicates = FIRST_PREDICATE;            // of one warp
    u32 thread_register = 0, block_register = 0, warp_register = 0;  // %tid, …
    u32 shared_bytes = 0, local_bytes = 0, max_threads = 1024;
    u32 shared_grain = 16;  // bytes of the narrowest access to shared memory
    bool uses_shared = false, fences = false;
    std::vector<Variable> globals;  // the variables that the kernel uses

    // For messages: the text of each instruction, its PTX line and its source line.
    std::vector<std::string> texts;
    std::vector<u32> lines, source_files, source_lines;
    std::unordered_map<u32, std::string> files;
};

// A PTX text, divided into functions and variables.
struct Module;
std::shared_ptr<const Module> read_module(std::string_view text);
// Decode one kernel of a module. Throw `Unknown` for an instruction, a name or a
// modifier that the interpreter does not know.
Program decode(const Module&, const std::string& kernel);
