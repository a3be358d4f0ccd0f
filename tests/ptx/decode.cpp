// Translates the PTX text of a kernel to instructions. The functions that it calls are
// inlined, so a program has no calls and no stack.
//
// A statement is text up to ";". Its mnemonic without the types of memory and vectors
// selects a handler from the table; its operands become offsets of registers or
// constants. Labels are resolved at the end, when all positions are known.
#include <utility>

#include "memory.h"
#include "module.h"
#include "table.h"

void add_collectives(Table&);

const Table& instructions() {
    static const Table all = [] {
        Table table;
        add_arithmetic(table);
        add_conversions(table);
        add_comparisons(table);
        add_memory(table);
        add_collectives(table);
        return table;
    }();
    return all;
}

namespace {

// The names that a block of braces declares. PTX may declare a register again in an
// inner block, and each inlined call needs registers of its own. So a register's full
// name starts with the prefix of its scope.
struct Scope {
    string prefix;
    std::map<string, string> types;       // type of a register, by its name
    std::map<string, string> ranges;      // type of registers, by "%r" for ".reg %r<9>"
    std::map<string, u64> locals;         // offset in local memory, by name
    std::map<string, string> parameters;  // full name of a call's parameter, by name
    bool function = false;  // the body of a call: names of outer scopes are not visible
};

class Decoder {
  public:
    Decoder(const Module& module, const string& name) : module_(module) {
        p_.name = name;
        p_.files = module.files;
        const auto kernel = module.functions.find(name);
        if (kernel == module.functions.end())
            throw Unknown("the PTX has no kernel " + name);
        constants_.reserve(64);
        read_head(kernel->second.head);
        special_registers();
        body(kernel->second, {Scope{}}, "");
        finish();
    }
    Program take() { return std::move(p_); }

  private:
    const Module& module_;
    Program p_;
    std::unordered_map<string, u32> special_, registers_, predicates_;  // operands
    std::map<std::pair<int, u64>, u32> constants_of_bits_;  // by bytes and bits
    std::map<string, u64> shared_at_;                       // offsets of variables
    std::map<string, u32> labels_, global_constants_;
    std::vector<std::pair<u32, string>> branches_;  // instruction, label
    std::vector<std::pair<u32, string>> dynamic_;   // constant, its bytes
    std::vector<u8> constants_;
    std::vector<Scope> scopes_;  // the innermost scope is last
    string function_;            // prefix of labels; empty in the kernel itself
    string statement_;
    u32 line_ = 0, file_ = 0, source_line_ = 0, calls_ = 0, blocks_ = 0;

    [[noreturn]] void unknown(const string& what) const {
        throw Unknown(what + " in `" + statement_ + "`, PTX line " +
                      std::to_string(line_));
    }

    // Read the parameters and the launch bound of the kernel. As in C, each parameter
    // is aligned to its own alignment in the block of arguments.
    void read_head(const string& head) {
        const size_t open = head.find('('), close = head.rfind(')');
        if (open != string::npos)
            for (const string& text :
                 split(string_view(head).substr(open + 1, close - open - 1))) {
                const Declared d = declared(text);
                p_.parameter_bytes =
                    u32((p_.parameter_bytes + d.align - 1) / d.align * d.align);
                p_.parameters.push_back({d.name, p_.parameter_bytes, u32(d.bytes)});
                p_.parameter_bytes += u32(d.bytes);
            }
        if (const size_t at = head.find(".maxntid"); at != string::npos)
            p_.max_threads = u32(std::stoul(head.substr(at + 8)));
    }

    // ---- operands

    u32 new_register(int bytes) {
        const u32 at = p_.register_bytes;
        p_.register_bytes += bytes == 8 ? 256 : 128;  // 32 lanes of 8 or 4 bytes
        return at;
    }
    u32 new_constant(int bytes) {
        const u32 at = u32(constants_.size());
        constants_.resize(at + (bytes == 8 ? 256 : 128));
        return at | CONSTANT;
    }
    // Return the constant of a value in all lanes; equal constants are stored once.
    u32 constant(u64 value, int bytes) {
        if (bytes < 8) bytes = 4, value = u32(value);
        auto [at, is_new] = constants_of_bits_.try_emplace({bytes, value});
        if (is_new) {
            at->second = new_constant(bytes);
            for (int l = 0; l < LANES; ++l)
                memcpy(&constants_[(at->second & ~CONSTANT) + l * bytes], &value,
                       bytes);
        }
        return at->second;
    }

    // The registers that name a thread: registers of the warp if they differ between
    // warps, constants if all warps agree. Grids and blocks extend in x only.
    void special_registers() {
        special_["%tid.x"] = p_.thread_register = new_register(4);
        special_["%ctaid.x"] = p_.block_register = new_register(4);
        special_["%warpid"] = p_.warp_register = new_register(4);
        for (const string name : {"%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"})
            special_[name] = constant(0, 4);
        for (const string name : {"%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"})
            special_[name] = constant(1, 4);
        special_["%ntid.x"] = new_constant(4);
        special_["%nctaid.x"] = new_constant(4);
        p_.launch_constants.push_back(
            {LaunchConstant::BLOCK_SIZE, special_["%ntid.x"]});
        p_.launch_constants.push_back(
            {LaunchConstant::GRID_SIZE, special_["%nctaid.x"]});
        const auto by_lane = [&](const string& name, auto f) {
            const u32 at = special_[name] = new_constant(4);
            for (u32 l = 0; l < LANES; ++l) {
                const u32 value = f(l);
                memcpy(&constants_[(at & ~CONSTANT) + 4 * l], &value, 4);
            }
        };
        by_lane("%laneid", [](u32 l) { return l; });
        by_lane("%lanemask_lt", [](u32 l) { return (1u << l) - 1; });
        by_lane("%lanemask_eq", [](u32 l) { return 1u << l; });
    }

    // Return the type of a register, and its name with its scope's prefix. Search from
    // the innermost scope outwards, up to the body of the current call.
    std::pair<string, string> find(const string& name) const {
        const string range = name.substr(0, name.find_last_not_of("0123456789") + 1);
        for (size_t n = scopes_.size(); n--;) {
            const Scope& scope = scopes_[n];
            if (auto at = scope.types.find(name); at != scope.types.end())
                return {at->second, scope.prefix + name};
            if (auto at = scope.ranges.find(range); at != scope.ranges.end())
                return {at->second, scope.prefix + name};
            if (scope.function) break;
        }
        unknown("unknown register " + name);
    }
    // The bytes of a register in each lane: 4 or 8.
    int width(const string& name) const {
        if (special_.count(name)) return 4;
        return bytes_of(find(name).first) == 8 ? 8 : 4;
    }

    // Return the operand of a text: a register, a literal or the address of a variable.
    // A register gets its memory at its first use.
    u32 operand(const string& text, int bytes) {
        if (text == "_") return new_register(bytes);  // a result that is not needed
        if (text == "WARP_SZ") return constant(LANES, bytes);
        if (is_literal(text)) return constant(bits_of(text, bytes), bytes);
        if (text[0] != '%') return symbol(text, bytes);
        if (auto at = special_.find(text); at != special_.end()) return at->second;
        const auto [type, name] = find(text);
        if (type == "pred") unknown("a predicate is used as a value");
        if ((bytes_of(type) == 8) != (bytes == 8))
            unknown("unexpected width of " + text);
        if (auto at = registers_.find(name); at != registers_.end()) return at->second;
        return registers_[name] = new_register(bytes);
    }

    // Return the predicate of a text such as "%p1", "!%p1" or a literal.
    u32 predicate(const string& text) {
        if (text == "_") return UNUSED_PREDICATE;
        const bool negated = text[0] == '!';
        const string name = negated ? trimmed(text.substr(1)) : text;
        if (is_literal(name))
            return TRUE_PREDICATE | ((name == "0") != negated ? NEGATED : 0);
        const auto [type, full] = find(name);
        if (type != "pred") unknown(name + " is not a predicate");
        auto [at, is_new] = predicates_.try_emplace(full, p_.predicates);
        if (is_new) ++p_.predicates;
        return at->second | (negated ? NEGATED : 0);
    }

    // Return the address of a variable, as a constant.
    u32 symbol(const string& name, int bytes) {
        for (size_t n = scopes_.size(); n--;)
            if (auto at = scopes_[n].locals.find(name); at != scopes_[n].locals.end())
                return constant(at->second, bytes);
        if (shared_at_.count(name)) return constant(shared_at_[name], bytes);
        if (auto at = module_.shared.find(name); at != module_.shared.end()) {
            place_shared(at->second);
            if (at->second.sized) return constant(shared_at_[name], bytes);
            // Dynamic shared memory starts behind all static variables: `finish` fills
            // this constant.
            const u32 here = new_constant(bytes);
            dynamic_.push_back({here, std::to_string(bytes)});
            return here;
        }
        if (auto at = module_.globals.find(name); at != module_.globals.end()) {
            if (bytes != 8) unknown("an address of global memory in 4 bytes");
            return global_address(name, at->second);
        }
        unknown("unknown symbol " + name);
    }
    // Give a static shared variable its offset.
    void place_shared(const Declared& d) {
        p_.uses_shared = true;
        if (!d.sized || shared_at_.count(d.name)) return;
        const u64 at = (p_.shared_bytes + d.align - 1) / d.align * d.align;
        shared_at_[d.name] = at;
        p_.shared_bytes = u32(at + d.bytes);
    }
    u32 global_address(const string& name, const Variable& variable) {
        if (auto at = global_constants_.find(name); at != global_constants_.end())
            return at->second;
        // 256 more bytes leave room for any alignment. The address stays valid: moving
        // a std::vector does not move its elements.
        Variable v = variable;
        v.value.resize(v.bytes + 256);
        const u64 start = reinterpret_cast<u64>(v.value.data());
        const u64 address = (start + 255) / 256 * 256;
        memmove(v.value.data() + (address - start), v.value.data(), v.bytes);
        p_.globals.push_back(std::move(v));
        return global_constants_[name] = constant(address, 8);
    }

    // Return the base of an address such as "[%rd1+8]"; `offset` receives the 8.
    u32 address(const string& text, Instruction& i, s64* offset) {
        const string inside = trimmed(string_view(text).substr(1, text.rfind(']') - 1));
        const size_t plus = inside.find('+');
        const string base = trimmed(inside.substr(0, plus));
        *offset = plus == string::npos
                      ? 0
                      : s64(bits_of(trimmed(inside.substr(plus + 1)), 8));
        i.wide_address = base[0] != '%' || width(base) == 8;
        return operand(base, i.wide_address ? 8 : 4);
    }
    // The elements of a vector such as "{%r1, %r2}"; a scalar is one element.
    Strings elements(const string& text) const {
        return text[0] == '{' ? split(text.substr(1, text.rfind('}') - 1))
                              : Strings{text};
    }

    // ---- statements

    // Translate the body of the kernel, or of a function at the place of its call.
    void body(const Function& function, std::vector<Scope> scopes,
              const string& prefix) {
        const std::vector<Scope> outer = std::exchange(scopes_, std::move(scopes));
        const string before = std::exchange(function_, prefix);
        Reader reader(module_.text, function.start, function.end, function.line);
        char stop;
        while (reader.skip()) {
            // ".loc FILE LINE …" names the source of the next instructions.
            if (reader.next_is(".loc") && isspace(reader.rest()[4])) {
                const string loc = reader.until("\n");
                const Strings words = split(loc, ' ');
                file_ = u32(std::stoul(words[1])),
                source_line_ = u32(std::stoul(words[2]));
                continue;
            }
            line_ = reader.line;
            if (reader.rest()[0] == '{') {
                ++reader.at;
                scopes_.push_back(
                    {"block" + std::to_string(++blocks_) + ":", {}, {}, {}, {}, false});
            } else if (reader.rest()[0] == '}') {
                ++reader.at;
                scopes_.pop_back();
            } else if (!label(reader)) {
                statement_ = reader.until(";{", &stop);
                if (stop == '{')  // this brace opens a list of operands
                    statement_ += " {" + reader.until(";");
                statement();
            }
        }
        scopes_ = outer;
        function_ = before;
    }

    // Read a label if one is next.
    bool label(Reader& reader) {
        const string_view rest = reader.rest();
        size_t n = 0;
        while (n < rest.size() &&
               (isalnum(rest[n]) || rest[n] == '_' || rest[n] == '$'))
            ++n;
        if (n == 0 || n >= rest.size() || rest[n] != ':') return false;
        labels_[function_ + string(rest.substr(0, n))] = u32(p_.code.size());
        reader.at += n + 1;
        return true;
    }

    // Translate a declaration, or pass an instruction on.
    void statement() {
        const string& text = statement_;
        if (text.empty() || starts_with(text, ".pragma")) return;
        if (starts_with(text, ".reg")) {
            // ".reg .b32 %r<9>" declares %r0 to %r8, ".reg .b32 a, b" two registers.
            const size_t name = text.find_first_of("% ", text.find('.', 4));
            const string type = trimmed(
                text.substr(text.find('.', 4) + 1, name - text.find('.', 4) - 1));
            for (const string& one : split(text.substr(name))) {
                if (const size_t count = one.find('<'); count != string::npos)
                    scopes_.back().ranges[one.substr(0, count)] = type;
                else
                    scopes_.back().types[one] = type;
            }
        } else if (starts_with(text, ".shared")) {
            place_shared(declared(text));
        } else if (starts_with(text, ".local")) {
            const Declared d = declared(text);
            p_.local_bytes = (p_.local_bytes + 15) / 16 * 16;
            scopes_.back().locals[d.name] = p_.local_bytes;
            p_.local_bytes += u32((d.bytes + 15) / 16 * 16);
        } else if (starts_with(text, ".param")) {  // of a call in this body
            const string name = declared(text).name;
            scopes_.back().parameters[name] = scopes_.back().prefix + name;
        } else if (text[0] == '.') {
            unknown("unknown directive");
        } else {
            instruction();
        }
    }

    void instruction() {
        string text = statement_;
        Instruction i;
        if (text[0] == '@') {  // "@%p1 …" runs only where %p1 is true
            const size_t space = text.find_first_of(" \t");
            i.guard = predicate(text.substr(1, space - 1));
            text = trimmed(text.substr(space));
        }
        const size_t space = text.find_first_of(" \t");
        const string mnemonic = text.substr(0, space);
        const Strings operands =
            space == string::npos ? Strings{} : split(text.substr(space));
        const Strings parts = split(mnemonic, '.');
        const string& base = parts[0];
        if (base == "bra") return branch(i, function_ + operands[0]);
        if (base == "ret" || base == "exit") return leave(i);
        if (base == "call") return call(operands);
        if (base == "ld" || base == "ldu") return load(i, parts, operands);
        if (base == "st") return store(i, parts, operands);
        if (base == "atom" || base == "red") return atomic(i, parts, operands);
        if (base == "bar" || base == "barrier") return barrier(i, parts, operands);
        if (base == "membar" || base == "fence") return fence(i, mnemonic);
        if (base == "cp") return copy(i, parts, operands);
        if (base == "ldmatrix") return matrices(i, parts, operands);
        if (base == "mma") return matrix_product(i, mnemonic, operands);
        if (base == "cvta") return convert_address(i, parts, operands);
        if (base == "mov" && (operands[0][0] == '{' || operands[1][0] == '{'))
            return repack(i, parts, operands);
        plain(i, mnemonic, operands);
    }

    // Append an instruction, with what messages need.
    void emit(Instruction i) {
        p_.code.push_back(i);
        p_.texts.push_back(statement_);
        p_.lines.push_back(line_);
        p_.source_files.push_back(file_);
        p_.source_lines.push_back(source_line_);
    }
    Handler handler(const string& name) const {
        const auto at = instructions().find(name);
        if (at == instructions().end()) unknown("unknown instruction");
        return at->second.run;
    }

    // An instruction whose whole mnemonic is in the table.
    void plain(Instruction& i, const string& mnemonic, Strings operands) {
        string name = mnemonic;
        if (const size_t rn = name.find(".rn."); rn != string::npos) name.erase(rn, 3);
        const auto entry = instructions().find(name);
        if (entry == instructions().end()) unknown("unknown instruction");
        const Form& form = entry->second;
        i.run = form.run;
        // "%r1|%p1" stands for two results. The handlers of setp and shfl always write
        // two; the second one may be unused.
        if (const size_t bar = operands[0].find('|'); bar != string::npos) {
            operands.insert(operands.begin() + 1, trimmed(operands[0].substr(bar + 1)));
            operands[0] = trimmed(operands[0].substr(0, bar));
        } else if (starts_with(name, "setp") || starts_with(name, "shfl")) {
            operands.insert(operands.begin() + 1, "_");
        }
        if (operands.size() != form.bytes.size())
            unknown("unexpected number of operands");
        narrow(name, form, operands);
        for (size_t n = 0; n < operands.size(); ++n)
            i.o[n] = form.bytes[n] ? operand(operands[n], form.bytes[n])
                                   : predicate(operands[n]);
        i.operands = u8(operands.size());
        if (name.find(".sync") != string::npos) i.flow = COLLECTIVE;
        emit(i);
    }

    // cvt may read a narrow type from a register of 8 bytes: then it takes the lower
    // half. Copy that half to a register of 4 bytes first.
    void narrow(const string& name, const Form& form, Strings& operands) {
        if (!starts_with(name, "cvt.") || form.bytes[1] == 8 || operands[1][0] != '%')
            return;
        if (width(operands[1]) != 8) return;
        Instruction lower;
        lower.run = handler("cvt.u32.u64");
        lower.o[0] = new_register(4);
        lower.o[1] = operand(operands[1], 8);
        emit(lower);
        operands[1] = "%lower" + std::to_string(p_.code.size());
        special_[operands[1]] = lower.o[0];
    }

    // ---- instructions with rules of their own

    void branch(Instruction& i, const string& label) {
        i.flow = BRANCH;
        branches_.push_back({u32(p_.code.size()), label});
        emit(i);
    }
    // `ret` ends the lanes of a kernel. In an inlined function it jumps to the end.
    void leave(Instruction& i) {
        if (!function_.empty()) return branch(i, function_ + "end");
        i.flow = EXIT;
        emit(i);
    }
    // Inline a call. Its operands are: (results), function, (arguments). Both lists may
    // be absent. Each formal parameter becomes another name of the actual one.
    void call(const Strings& operands) {
        const bool returns = operands[0][0] == '(';
        const string& name = operands[returns ? 1 : 0];
        const auto callee = module_.functions.find(name);
        if (callee == module_.functions.end()) unknown("unknown function");
        const string& head = callee->second.head;
        Scope scope;
        scope.prefix = "call" + std::to_string(++calls_) + ":";
        scope.function = true;
        const auto bind = [&](const string& formals, const string& actuals) {
            const Strings names = split(formals), values = split(actuals);
            for (size_t n = 0; n < names.size(); ++n)
                scope.parameters[declared(names[n]).name] =
                    parameter_name(values.at(n));
        };
        const auto inside = [](const string& text) {
            const size_t open = text.find('(');
            return open == string::npos
                       ? ""
                       : text.substr(open + 1, text.find(')', open) - open - 1);
        };
        const size_t at = head.find(name);
        if (returns) bind(inside(head), inside(operands[0]));
        if (operands.size() > (returns ? 2u : 1u))
            bind(inside(head.substr(at)), inside(operands.back()));
        const string prefix = scope.prefix;
        body(callee->second, {scope}, prefix);
        labels_[prefix + "end"] = u32(p_.code.size());
    }
    // The full name of a call's parameter; empty for a parameter of the kernel.
    string parameter_name(const string& name) const {
        for (size_t n = scopes_.size(); n--;)
            if (auto at = scopes_[n].parameters.find(name);
                at != scopes_[n].parameters.end())
                return at->second;
        return "";
    }

    // A parameter of the kernel is a constant; a parameter of a call is a register.
    u32 parameter(const string& text, int bytes) {
        const string inside = text.substr(1, text.rfind(']') - 1);
        const size_t plus = inside.find('+');
        const string name = trimmed(inside.substr(0, plus));
        const u32 offset =
            plus == string::npos ? 0 : u32(std::stoul(inside.substr(plus + 1)));
        if (const string full = parameter_name(name); !full.empty()) {
            const string key = "param " + full + "+" + std::to_string(offset);
            if (!registers_.count(key)) registers_[key] = new_register(bytes);
            return registers_[key];
        }
        for (const Parameter& p : p_.parameters) {
            if (p.name != name) continue;
            const u32 at = new_constant(bytes);
            p_.launch_constants.push_back(
                {LaunchConstant::PARAMETER, at, p.at + offset, u32(bytes)});
            return at;
        }
        unknown("unknown parameter " + name);
    }

    // Read the modifiers of a load or store: memory, vector length, order. Those that
    // only choose a cache or a scope change nothing here.
    void memory_modifiers(Instruction& i, const Strings& parts) {
        for (size_t n = 1; n + 1 < parts.size(); ++n) {
            const string& part = parts[n];
            if (part == "global" || part == "const")
                i.space = GLOBAL;
            else if (part == "shared")
                i.space = SHARED;
            else if (part == "local")
                i.space = LOCAL;
            else if (part == "v2" || part == "v4")
                i.count = u8(part[1] - '0');
            else if (part == "volatile" || part == "relaxed")
                i.ordered = true;
            else if (part != "nc" && part != "weak" && part != "gpu" && part != "cta")
                unknown("unknown modifier " + part);
        }
        i.bytes = u8(bytes_of(parts.back()));
        note_grain(i.space, i.bytes * i.count);
    }
    // Note the width of an access that may go to shared memory: races within a warp are
    // recorded for units of the narrowest one.
    void note_grain(Space space, u32 bytes) {
        if (space != GLOBAL && space != LOCAL)
            p_.shared_grain = std::min(p_.shared_grain, bytes);
    }

    void load(Instruction& i, const Strings& parts, const Strings& operands) {
        if (parts[1] == "param") {
            const int bytes = bytes_of(parts.back());
            const bool widened = width(operands[0]) == 8 && bytes == 4;
            i.run = handler(
                widened      ? (parts.back() == "s32" ? "cvt.s64.s32" : "cvt.u64.u32")
                : bytes == 8 ? "mov.b64"
                             : "mov.b32");
            i.o[0] = operand(operands[0], width(operands[0]));
            i.o[1] = parameter(operands[1], bytes);
            if (!widened && (width(operands[0]) == 8) != (bytes == 8))
                unknown("unexpected width of a parameter");
            return emit(i);
        }
        memory_modifiers(i, parts);
        const Strings results = elements(operands[0]);
        const int wide = width(results[0]);
        for (size_t n = 0; n < results.size(); ++n) i.o[n] = operand(results[n], wide);
        i.o[i.count] = address(operands[1], i, &i.offset);
        i.run = loader(parts.back()[0] == 's', i.bytes, i.count, wide == 8);
        emit(i);
    }
    void store(Instruction& i, const Strings& parts, const Strings& operands) {
        if (parts[1] == "param") {
            const int bytes = bytes_of(parts.back());
            i.run = handler(bytes == 8 ? "mov.b64" : "mov.b32");
            i.o[0] = parameter(operands[0], bytes);
            i.o[1] = operand(operands[1], bytes);
            return emit(i);
        }
        memory_modifiers(i, parts);
        i.o[0] = address(operands[0], i, &i.offset);
        const Strings values = elements(operands[1]);
        const int wide =
            is_literal(values[0]) ? (i.bytes == 8 ? 8 : 4) : width(values[0]);
        for (size_t n = 0; n < values.size(); ++n)
            i.o[1 + n] = operand(values[n], wide);
        i.run = storer(i.bytes, i.count, wide == 8);
        emit(i);
    }
    void atomic(Instruction& i, const Strings& parts, Strings operands) {
        string operation;
        for (size_t n = 1; n + 1 < parts.size(); ++n) {
            if (parts[n] == "global")
                i.space = GLOBAL;
            else if (parts[n] == "shared")
                i.space = SHARED;
            else if (parts[n] != "gpu" && parts[n] != "cta" && parts[n] != "relaxed")
                operation = parts[n];
        }
        i.bytes = u8(bytes_of(parts.back()));
        note_grain(i.space, i.bytes);
        i.run = handler("atom." + operation + "." + parts.back());
        i.ordered = true;
        // `red` is `atom` without a result.
        if (parts[0] == "red") operands.insert(operands.begin(), "_");
        i.o[0] = operand(operands[0], i.bytes);
        i.o[1] = address(operands[1], i, &i.offset);
        for (size_t n = 2; n < operands.size(); ++n)
            i.o[n] = operand(operands[n], i.bytes);
        i.operands = u8(operands.size());
        emit(i);
    }

    void barrier(Instruction& i, const Strings& parts, const Strings& operands) {
        if (parts[1] == "warp") {
            i.run = handler("bar.warp.sync");
            i.flow = COLLECTIVE;
            i.o[0] = operand(operands[0], 4);
            i.operands = 1;
        } else if (parts.back() == "sync" && operands == Strings{"0"}) {
            i.flow = BARRIER;
        } else {
            unknown("unknown barrier");
        }
        emit(i);
    }
    void fence(Instruction& i, const string& mnemonic) {
        i.run = handler("membar");
        // A fence of scope "cta" orders nothing between blocks.
        p_.fences = p_.fences || mnemonic.find("cta") == string::npos;
        emit(i);
    }

    // cp.async copies from global to shared memory in the background. Operands: target,
    // source, bytes, and optionally the bytes that are read (the rest become zeros).
    void copy(Instruction& i, const Strings& parts, const Strings& operands) {
        if (parts[2] == "commit_group") {
            i.run = handler("cp.async.commit_group");
        } else if (parts[2] == "wait_group" || parts[2] == "wait_all") {
            i.run = handler("cp.async.wait_group");
            i.offset = parts[2] == "wait_all" ? -1 : std::stol(operands[0]);
        } else {
            if (operands.size() != 3 && operands.size() != 4)
                unknown("unexpected number of operands");
            i.run = handler("cp.async");
            s64 offset;
            i.o[1] = address(operands[1], i, &offset);
            i.target = u32(offset);
            i.o[0] = address(operands[0], i, &i.offset);
            i.bytes = u8(std::stoi(operands[2]));
            const bool all = operands.size() == 3;
            i.o[2] = all ? constant(i.bytes, 4) : operand(operands[3], 4);
            if (parts[2] == "cg" && i.bytes != 16)
                unknown("cp.async.cg must copy 16 bytes");
            note_grain(SHARED, i.bytes);
        }
        emit(i);
    }
    void matrices(Instruction& i, const Strings& parts, const Strings& operands) {
        const Strings results = elements(operands[0]);
        for (size_t n = 0; n < results.size(); ++n) i.o[n] = operand(results[n], 4);
        i.count = u8(results.size());
        i.o[i.count] = address(operands[1], i, &i.offset);
        const bool transposed = std::count(parts.begin(), parts.end(), "trans");
        i.run = handler(transposed ? "ldmatrix.trans" : "ldmatrix");
        with_all_lanes(i, i.count + 1);
    }
    void matrix_product(Instruction& i, const string& mnemonic,
                        const Strings& operands) {
        i.run = handler(mnemonic);
        int n = 0;
        for (const string& group : operands)
            for (const string& one : elements(group)) i.o[n++] = operand(one, 4);
        if (n < 14) return with_all_lanes(i, n);
        // All 14 operands are in use, so there is no room for a member mask. The
        // handler checks that all lanes are active.
        i.flow = PLAIN;
        emit(i);
    }
    void with_all_lanes(Instruction& i, int operands) {
        i.flow = COLLECTIVE;
        i.o[operands] = constant(ALL, 4);
        i.operands = u8(operands + 1);
        emit(i);
    }

    // cvta adds the window of a memory to an address; cvta.to subtracts it.
    void convert_address(Instruction& i, const Strings& parts,
                         const Strings& operands) {
        const bool to = parts[1] == "to";
        const string& space = parts[to ? 2 : 1];
        const u64 window = space == "shared"  ? SHARED_WINDOW
                           : space == "local" ? LOCAL_WINDOW
                                              : 0;
        i.run = handler("add.u64");
        i.o[0] = operand(operands[0], 8);
        i.o[1] = operand(operands[1], 8);
        i.o[2] = constant(to ? 0 - window : window, 8);
        emit(i);
    }

    // mov with braces: split a register into parts, or join parts to a register.
    void repack(Instruction& i, const Strings& parts, const Strings& operands) {
        const bool pack = operands[1][0] == '{';
        const Strings few = elements(operands[pack ? 1 : 0]);
        const int bytes = bytes_of(parts.back());
        i.count = u8(few.size());
        i.bytes = u8(bytes / i.count);
        if (i.bytes != 2 && i.bytes != 4)
            unknown("unexpected width of a part of a register");
        const int first = pack ? 1 : 0;
        i.o[pack ? 0 : i.count] = operand(operands[pack ? 0 : 1], bytes);
        for (int n = 0; n < i.count; ++n) i.o[first + n] = operand(few[n], 4);
        i.run = handler(string(pack ? "pack" : "unpack") + ".b" +
                        std::to_string(8 * bytes) + ".x" + std::to_string(i.count));
        emit(i);
    }

    // ---- the end

    void finish() {
        Instruction end;
        end.flow = EXIT;
        emit(end);
        // Dynamic shared memory starts at a multiple of 16 bytes.
        if (!dynamic_.empty()) p_.shared_bytes = (p_.shared_bytes + 15) / 16 * 16;
        for (const auto& [at, bytes] : dynamic_)
            for (int l = 0; l < LANES; ++l) {
                const u64 address = p_.shared_bytes;
                memcpy(&constants_[(at & ~CONSTANT) + l * std::stoi(bytes)], &address,
                       std::stoi(bytes));
            }
        std::vector<bool> is_target(p_.code.size());
        for (const auto& [at, label] : branches_) {
            const auto target = labels_.find(label);
            if (target == labels_.end()) throw Unknown("unknown label " + label);
            p_.code[at].target = target->second;
            is_target[target->second] = true;
        }
        // Count the straight-line code behind each instruction, from the end on. Lanes
        // may join at the target of a branch, so straight-line code ends there.
        for (size_t n = p_.code.size(); n--;) {
            Instruction& i = p_.code[n];
            if (i.flow != PLAIN || i.guard != TRUE_PREDICATE) continue;
            const bool last = n + 1 == p_.code.size() || is_target[n + 1];
            i.straight = last ? 1 : p_.code[n + 1].straight + 1;
        }
        p_.constants = std::move(constants_);
    }
};

}  // namespace

std::shared_ptr<const Module> read_module(string_view text) {
    return std::make_shared<const Module>(text);
}
Program decode(const Module& module, const string& kernel) {
    return Decoder(module, kernel).take();
}
