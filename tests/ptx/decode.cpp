// PTX text to instructions. Functions that a kernel calls are put in line.
#include <utility>

#include "memory.h"
#include "module.h"
#include "table.h"

void add_together(Table&);

const Table& instructions() {
    static const Table all = [] {
        Table table;
        add_arithmetic(table);
        add_conversions(table);
        add_comparisons(table);
        add_memory(table);
        add_together(table);
        return table;
    }();
    return all;
}

namespace {

struct Scope {
    string prefix;                    // of its registers' names
    std::map<string, string> types;   // of registers, by name
    std::map<string, string> ranges;  // of registers, by "%r" and so on
    std::map<string, u64> locals;
    std::map<string, string> parameters;  // of calls: what they are called here
    bool function = false;                // no name from outside is seen
};

class Decoder {
  public:
    Decoder(const Module& module, const string& name) : module_(module) {
        p_.name = name;
        p_.files = module.files;
        const auto found = module.functions.find(name);
        if (found == module.functions.end()) throw Unknown("no kernel " + name);
        constants_.reserve(64);
        read_head(found->second.head);
        special_registers();
        body(found->second, {Scope{}}, "");
        finish();
    }
    Program take() { return std::move(p_); }

  private:
    const Module& module_;
    Program p_;
    std::unordered_map<string, u32> special_, registers_, predicates_;
    std::map<std::pair<int, u64>, u32> constants_of_bits_;
    std::map<string, u64> shared_at_;
    std::map<string, u32> labels_, global_constants_;
    std::vector<std::pair<u32, string>> branches_;
    std::vector<std::pair<u32, string>> dynamic_;
    std::vector<u8> constants_;
    std::vector<Scope> scopes_;
    string function_;  // prefix of labels; empty in the kernel itself
    string statement_;
    u32 line_ = 0, file_ = 0, source_line_ = 0, calls_ = 0, blocks_ = 0;

    [[noreturn]] void unknown(const string& what) const {
        throw Unknown(what + " in `" + statement_ + "`, line " + std::to_string(line_));
    }

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
        p_.register_bytes += bytes == 8 ? 256 : 128;
        return at;
    }
    u32 new_constant(int bytes) {
        const u32 at = u32(constants_.size());
        constants_.resize(at + (bytes == 8 ? 256 : 128));
        return at | CONSTANT;
    }
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

    // The type of a register, and its name with its scope's prefix.
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
        unknown("register " + name);
    }
    int width(const string& name) const {  // of a register: 4 or 8
        if (special_.count(name)) return 4;
        return bytes_of(find(name).first) == 8 ? 8 : 4;
    }

    u32 operand(const string& text, int bytes) {
        if (text == "_") return new_register(bytes);
        if (text == "WARP_SZ") return constant(LANES, bytes);
        if (is_literal(text)) return constant(bits_of(text, bytes), bytes);
        if (text[0] != '%') return symbol(text, bytes);
        if (auto at = special_.find(text); at != special_.end()) return at->second;
        const auto [type, name] = find(text);
        if (type == "pred") unknown("predicate as a value");
        if ((bytes_of(type) == 8) != (bytes == 8)) unknown("width of " + text);
        if (auto at = registers_.find(name); at != registers_.end()) return at->second;
        return registers_[name] = new_register(bytes);
    }

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

    u32 symbol(const string& name, int bytes) {
        for (size_t n = scopes_.size(); n--;)
            if (auto at = scopes_[n].locals.find(name); at != scopes_[n].locals.end())
                return constant(at->second, bytes);
        if (shared_at_.count(name)) return constant(shared_at_[name], bytes);
        if (auto at = module_.shared.find(name); at != module_.shared.end()) {
            place_shared(at->second);
            if (at->second.sized) return constant(shared_at_[name], bytes);
            const u32 here = new_constant(bytes);  // behind all that has a size
            dynamic_.push_back({here, std::to_string(bytes)});
            return here;
        }
        if (auto at = module_.globals.find(name); at != module_.globals.end()) {
            if (bytes != 8) unknown("address in 4 bytes");
            return global_address(name, at->second);
        }
        unknown("symbol " + name);
    }
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
        // With room for any alignment; the bytes do not move when the vector does.
        Variable v = variable;
        v.value.resize(v.bytes + 256);
        const u64 start = reinterpret_cast<u64>(v.value.data());
        const u64 address = (start + 255) / 256 * 256;
        memmove(v.value.data() + (address - start), v.value.data(), v.bytes);
        p_.globals.push_back(std::move(v));
        return global_constants_[name] = constant(address, 8);
    }

    // "[%rd1+8]"
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
    Strings elements(const string& text) const {  // of "{%r1, %r2}", or one
        return text[0] == '{' ? split(text.substr(1, text.rfind('}') - 1))
                              : Strings{text};
    }

    // ---- statements

    void body(const Function& function, std::vector<Scope> scopes,
              const string& prefix) {
        const std::vector<Scope> outer = std::exchange(scopes_, std::move(scopes));
        const string before = std::exchange(function_, prefix);
        Reader reader(module_.text, function.begin, function.end, function.line);
        char stop;
        while (reader.skip()) {
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
                if (stop == '{')  // of operands, not of statements
                    statement_ += " {" + reader.until(";");
                statement();
            }
        }
        scopes_ = outer;
        function_ = before;
    }

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

    void statement() {
        const string& text = statement_;
        if (text.empty() || starts_with(text, ".pragma")) return;
        if (starts_with(text, ".reg")) {
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
        } else if (starts_with(text, ".param")) {
            const string name = declared(text).name;
            scopes_.back().parameters[name] = scopes_.back().prefix + name;
        } else if (text[0] == '.') {
            unknown("directive");
        } else {
            instruction();
        }
    }

    void instruction() {
        string text = statement_;
        Instruction i;
        if (text[0] == '@') {
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

    void emit(Instruction i) {
        p_.code.push_back(i);
        p_.texts.push_back(statement_);
        p_.lines.push_back(line_);
        p_.source_files.push_back(file_);
        p_.source_lines.push_back(source_line_);
    }
    Handler handler(const string& name) const {
        const auto at = instructions().find(name);
        if (at == instructions().end()) unknown("instruction");
        return at->second.run;
    }

    void plain(Instruction& i, const string& mnemonic, Strings operands) {
        string name = mnemonic;
        if (const size_t rn = name.find(".rn."); rn != string::npos) name.erase(rn, 3);
        const auto found = instructions().find(name);
        if (found == instructions().end()) unknown("instruction");
        const Form& form = found->second;
        i.run = form.run;
        // "%r1|%p1" is two results; setp and shfl always have two here.
        if (const size_t bar = operands[0].find('|'); bar != string::npos) {
            operands.insert(operands.begin() + 1, trimmed(operands[0].substr(bar + 1)));
            operands[0] = trimmed(operands[0].substr(0, bar));
        } else if (starts_with(name, "setp") || starts_with(name, "shfl")) {
            operands.insert(operands.begin() + 1, "_");
        }
        if (operands.size() != form.bytes.size()) unknown("number of operands");
        narrow(name, form, operands);
        for (size_t n = 0; n < operands.size(); ++n)
            i.o[n] = form.bytes[n] ? operand(operands[n], form.bytes[n])
                                   : predicate(operands[n]);
        i.operands = u8(operands.size());
        if (name.find(".sync") != string::npos) i.flow = TOGETHER;
        emit(i);
    }

    // cvt takes the lower half of a register of 8 bytes.
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

    // ---- forms of their own

    void branch(Instruction& i, const string& label) {
        i.flow = BRANCH;
        branches_.push_back({u32(p_.code.size()), label});
        emit(i);
    }
    void leave(Instruction& i) {
        if (!function_.empty()) return branch(i, function_ + "end");
        i.flow = EXIT;
        emit(i);
    }
    void call(const Strings& operands) {  // (results), function, (arguments)
        const bool returns = operands[0][0] == '(';
        const string& name = operands[returns ? 1 : 0];
        const auto found = module_.functions.find(name);
        if (found == module_.functions.end()) unknown("function");
        const string& head = found->second.head;
        Scope scope;
        scope.prefix = "call" + std::to_string(++calls_) + ":";
        scope.function = true;
        const auto bind = [&](const string& formals, const string& actuals) {
            const Strings names = split(formals), given = split(actuals);
            for (size_t n = 0; n < names.size(); ++n)
                scope.parameters[declared(names[n]).name] = parameter_name(given.at(n));
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
        body(found->second, {scope}, prefix);
        labels_[prefix + "end"] = u32(p_.code.size());
    }
    string parameter_name(const string& name) const {
        for (size_t n = scopes_.size(); n--;)
            if (auto at = scopes_[n].parameters.find(name);
                at != scopes_[n].parameters.end())
                return at->second;
        return "";
    }

    // A kernel's parameter is a constant, one of a call a register.
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
        unknown("parameter " + name);
    }

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
                unknown("modifier " + part);
        }
        i.bytes = u8(bytes_of(parts.back()));
        note_grain(i.space, i.bytes * i.count);
    }
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
                unknown("width of a parameter");
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
            i.flow = TOGETHER;
            i.o[0] = operand(operands[0], 4);
            i.operands = 1;
        } else if (parts.back() == "sync" && operands == Strings{"0"}) {
            i.flow = BARRIER;
        } else {
            unknown("barrier");
        }
        emit(i);
    }
    void fence(Instruction& i, const string& mnemonic) {
        i.run = handler("membar");
        p_.fences = p_.fences || mnemonic.find("cta") == string::npos;
        emit(i);
    }

    void copy(Instruction& i, const Strings& parts, const Strings& operands) {
        if (parts[2] == "commit_group") {
            i.run = handler("cp.async.commit_group");
        } else if (parts[2] == "wait_group" || parts[2] == "wait_all") {
            i.run = handler("cp.async.wait_group");
            i.offset = parts[2] == "wait_all" ? -1 : std::stol(operands[0]);
        } else {
            if (operands.size() != 3 && operands.size() != 4) unknown("cp.async");
            i.run = handler("cp.async");
            s64 offset;
            i.o[1] = address(operands[1], i, &offset);
            i.target = u32(offset);
            i.o[0] = address(operands[0], i, &i.offset);
            i.bytes = u8(std::stoi(operands[2]));
            const bool all = operands.size() == 3;
            i.o[2] = all ? constant(i.bytes, 4) : operand(operands[3], 4);
            if (parts[2] == "cg" && i.bytes != 16)
                unknown("cp.async.cg of other than 16 bytes");
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
        i.flow = PLAIN;  // no room for a mask: the handler wants all lanes
        emit(i);
    }
    void with_all_lanes(Instruction& i, int operands) {
        i.flow = TOGETHER;
        i.o[operands] = constant(ALL, 4);
        i.operands = u8(operands + 1);
        emit(i);
    }

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

    // Parts of a register, or a register of parts.
    void repack(Instruction& i, const Strings& parts, const Strings& operands) {
        const bool pack = operands[1][0] == '{';
        const Strings few = elements(operands[pack ? 1 : 0]);
        const int bytes = bytes_of(parts.back());
        i.count = u8(few.size());
        i.bytes = u8(bytes / i.count);
        if (i.bytes != 2 && i.bytes != 4) unknown("parts of a register");
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
        if (!dynamic_.empty()) p_.shared_bytes = (p_.shared_bytes + 15) / 16 * 16;
        for (const auto& [at, bytes] : dynamic_)
            for (int l = 0; l < LANES; ++l) {
                const u64 address = p_.shared_bytes;
                memcpy(&constants_[(at & ~CONSTANT) + l * std::stoi(bytes)], &address,
                       std::stoi(bytes));
            }
        std::vector<bool> is_target(p_.code.size());
        for (const auto& [at, label] : branches_) {
            const auto found = labels_.find(label);
            if (found == labels_.end()) throw Unknown("label " + label);
            p_.code[at].target = found->second;
            is_target[found->second] = true;
        }
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
