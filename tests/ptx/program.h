// A kernel as the interpreter holds it: decoded instructions and what they name.
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
constexpr u32 ALL = ~0u;  // lanes of a whole warp

// Generic addresses: host addresses are global ones; shared and local memory lie in
// windows far above all host addresses.
constexpr u64 SHARED_WINDOW = 1ull << 60, LOCAL_WINDOW = 1ull << 61;
enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL };

// An operand is the offset of 32 lanes of 4 or 8 bytes: in the registers of a warp, or,
// with this bit, in the program's constants.
constexpr u32 CONSTANT = 1u << 31;
// A predicate is the index of a mask of lanes; this bit negates it.
constexpr u32 NEGATED = 1u << 31;
enum { TRUE_PREDICATE, UNUSED_PREDICATE, FIRST_PREDICATE };

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

enum Flow : u8 {
    PLAIN,     // falls through to the next instruction
    BRANCH,    // to `target`
    EXIT,      // ends its lanes
    BARRIER,   // waits for the whole block
    TOGETHER,  // waits for the lanes of a member mask, the last of the operands
};

struct Instruction {
    Handler run = nullptr;
    s64 offset = 0;              // added to an address
    u32 o[14] = {};              // operands: results first
    u32 guard = TRUE_PREDICATE;  // lanes that take part
    u32 target = 0;              // of a branch; the second offset of cp.async
    u32 straight = 0;            // plain, unguarded instructions from here on
    Flow flow = PLAIN;
    Space space = GENERIC;
    u8 bytes = 0;              // of an element
    u8 count = 1;              // elements of a vector
    u8 operands = 0;           // how many there are
    bool wide_address = true;  // 8 bytes, not 4
    bool ordered = false;      // volatile or atomic: may meet others of its kind
};

// What an instruction takes: the bytes of each operand, 0 for a predicate.
struct Form {
    Handler run = nullptr;
    std::vector<int> bytes;
    bool lanewise = false;
};
using Table = std::unordered_map<std::string, Form>;
const Table& instructions();  // by mnemonic, without .rn

struct Unknown : std::runtime_error {
    using runtime_error::runtime_error;
};

struct Parameter {
    std::string name;
    u32 at = 0, bytes = 0;  // in the block of arguments
};

// A constant that each launch fills in.
struct LaunchConstant {
    enum Kind { PARAMETER, BLOCK_SIZE, GRID_SIZE } kind;
    u32 constant, parameter_at = 0, bytes = 4;
};

struct Variable {
    u64 align = 1, bytes = 0;
    std::vector<u8> value;
};

struct Program {
    std::string name;
    std::vector<Instruction> code;
    std::vector<u8> constants;  // aligned by `constant_base`
    std::vector<LaunchConstant> launch_constants;
    std::vector<Parameter> parameters;
    u32 parameter_bytes = 0;
    u32 register_bytes = 0, predicates = FIRST_PREDICATE;
    u32 thread_register = 0, block_register = 0, warp_register = 0;
    u32 shared_bytes = 0, local_bytes = 0, max_threads = 1024;
    u32 shared_grain = 16;  // bytes of the narrowest access to shared memory
    bool uses_shared = false, fences = false;
    std::vector<Variable> globals;  // which the kernel reads

    // For messages: the text of each instruction and where it comes from.
    std::vector<std::string> texts;
    std::vector<u32> lines, source_files, source_lines;
    std::unordered_map<u32, std::string> files;
};

// A PTX text, cut into functions and variables.
struct Module;
std::shared_ptr<const Module> read_module(std::string_view text);
// Decode one of its kernels; raise `Unknown` for what is not known.
Program decode(const Module&, const std::string& kernel);
