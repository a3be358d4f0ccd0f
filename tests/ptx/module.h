// A PTX text, divided into functions and variables; decode.cpp reads their statements.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>
#include <map>

#include "program.h"

using std::string;
using std::string_view;
using Strings = std::vector<string>;

inline bool starts_with(string_view text, string_view with) {
    return text.substr(0, with.size()) == with;
}
inline string trimmed(string_view text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    if (first == string_view::npos) return "";
    return string(text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1));
}

// Split at separators outside brackets, so "{%r1, %r2}, [%rd1]" has two parts.
inline Strings split(string_view text, char separator = ',') {
    Strings parts;
    int depth = 0;
    size_t from = 0;
    for (size_t i = 0; i <= text.size(); ++i) {
        if (i == text.size() || (text[i] == separator && depth == 0)) {
            if (string part = trimmed(text.substr(from, i - from)); !part.empty())
                parts.push_back(part);
            from = i + 1;
        } else {
            depth += strchr("([{", text[i]) ? 1 : strchr(")]}", text[i]) ? -1 : 0;
        }
    }
    return parts;
}

// The size of a type such as "f32" or ".b64"; 0 for a predicate.
inline int bytes_of(string_view type) {
    const size_t digits = type.find_first_of("0123456789");
    if (digits == string_view::npos) return 0;
    return std::stoi(string(type.substr(digits))) / 8;
}

inline bool is_literal(string_view text) {
    return isdigit(text[0]) || (text[0] == '-' && text.size() > 1);
}
// The bits of a literal. PTX writes floating-point constants as hexadecimal bits: "0f"
// and 8 digits for single precision, "0d" and 16 digits for double precision.
inline u64 bits_of(const string& text, int bytes) {
    if (starts_with(text, "0f") || starts_with(text, "0F")) {
        const u32 single = u32(std::stoul(text.substr(2), nullptr, 16));
        return bytes == 8 ? std::bit_cast<u64>(f64(std::bit_cast<float>(single)))
                          : single;
    }
    if (starts_with(text, "0d") || starts_with(text, "0D"))
        return std::stoull(text.substr(2), nullptr, 16);
    if (text[0] == '-') return u64(-s64(std::stoull(text.substr(1), nullptr, 0)));
    return std::stoull(text, nullptr, 0);
}

// A position in a text without comments, and its line number.
class Reader {
  public:
    Reader(string_view text, size_t at, size_t end, u32 line)
        : at(at), line(line), text_(text.substr(0, end)) {}
    size_t at;
    u32 line;

    // Skip white space. Return false at the end of the text.
    bool skip() {
        for (; at < text_.size(); ++at) {
            if (text_[at] == '\n') ++line;
            if (!isspace(text_[at])) return true;
        }
        return false;
    }
    bool next_is(string_view word) const { return starts_with(text_.substr(at), word); }
    string_view rest() const { return text_.substr(at); }

    // Read up to one of the characters `stops` and step past it. `stop` receives it.
    string until(const char* stops, char* stop = nullptr) {
        const size_t end = std::min(text_.find_first_of(stops, at), text_.size());
        string result(text_.substr(at, end - at));
        line += u32(std::count(result.begin(), result.end(), '\n'));
        std::replace_if(result.begin(), result.end(), isspace, ' ');
        if (stop) *stop = end < text_.size() ? text_[end] : 0;
        at = end + 1;
        return trimmed(result);
    }

    // Step past the closing brace of a block; the opening one is already behind.
    void past_block() {
        for (int depth = 1; depth && at < text_.size(); ++at) {
            const size_t end = std::min(text_.find_first_of("{}\n", at), text_.size());
            at = end;
            if (end == text_.size()) return;
            text_[end] == '\n' ? void(++line)
                               : void(depth += text_[end] == '{' ? 1 : -1);
        }
    }

  private:
    string_view text_;
};

// Replace comments by spaces, so that positions and line numbers stay the same.
inline string without_comments(string_view text) {
    string kept(text);
    for (size_t at = kept.find("//"); at != string::npos; at = kept.find("//", at)) {
        const size_t end = std::min(kept.find('\n', at), kept.size());
        std::fill(kept.begin() + at, kept.begin() + end, ' ');
    }
    return kept;
}

// A kernel or a device function: the text of its head, and the range of its body.
struct Function {
    string head;
    size_t start, end;
    u32 line;  // of the start
};
// A declaration such as ".shared .align 4 .b8 name[4096]".
struct Declared {
    string space, type, name;
    u64 align = 0, bytes = 0;
    bool sized = true;  // false for "name[]", whose size the launch sets
};

inline Declared declared(const string& text) {
    Declared d;
    for (const string& word : split(text, ' ')) {
        if (word == ".visible" || word == ".extern" || word == ".weak" ||
            word == ".common")
            continue;
        if (word[0] == '.' && d.space.empty()) {
            d.space = word.substr(1);
        } else if (word == ".align") {
            d.align = ~0ull;  // the next word is the number
        } else if (d.align == ~0ull) {
            d.align = std::stoull(word);
        } else if (word[0] == '.') {
            d.type = word.substr(1);
        } else {
            size_t bracket = word.find('[');
            d.name = word.substr(0, bracket);
            d.bytes = bytes_of(d.type);
            for (; bracket != string::npos; bracket = word.find('[', bracket + 1)) {
                const string length =
                    word.substr(bracket + 1, word.find(']', bracket) - bracket - 1);
                d.sized = d.sized && !length.empty();
                d.bytes *= length.empty() ? 0 : std::stoull(length);
            }
        }
    }
    if (!d.align) d.align = std::max(bytes_of(d.type), 1);
    return d;
}

struct Module {
    string text;
    std::map<string, Function> functions;
    std::map<string, Declared> shared;
    std::map<string, Variable> globals;
    std::unordered_map<u32, string> files;

    explicit Module(string_view source) : text(without_comments(source)) {
        Reader reader(text, 0, text.size(), 1);
        while (reader.skip()) {
            if (reader.next_is(".section")) {  // debug information: skipped
                reader.until("{");
                reader.past_block();
            } else if (reader.next_is(".file")) {
                const string line = reader.until("\n");
                const size_t quote = line.find('"');
                files[u32(std::stoul(line.substr(6)))] =
                    line.substr(quote + 1, line.rfind('"') - quote - 1);
            } else if (reader.next_is(".version") || reader.next_is(".target") ||
                       reader.next_is(".address_size")) {
                reader.until("\n");
            } else {
                declare(reader);
            }
        }
    }

  private:
    // Read one declaration. The character behind its head tells what it is: "=" for a
    // variable with a value, "{" for a function, ";" for a variable without a value.
    void declare(Reader& reader) {
        char stop;
        const string head = reader.until(";{=", &stop);
        if (stop == '=') {
            add_global(head, reader.until(";"));
        } else if (stop == '{') {
            const size_t start = reader.at;
            const u32 line = reader.line;
            reader.past_block();
            functions[name_of(head)] = {head, start, reader.at - 1, line};
        } else if (head.find(".shared") != string::npos) {
            const Declared d = declared(head);
            shared[d.name] = d;
        } else if (head.find(".global") != string::npos ||
                   head.find(".const") != string::npos) {
            add_global(head, "");
        }
    }
    // The name of a function: ".entry name(…)" for a kernel, ".func (result) name(…)"
    // for a device function.
    static string name_of(const string& head) {
        size_t at = head.find(".entry");
        if (at == string::npos) {
            at = head.find(".func") + 5;
            if (const size_t first = head.find_first_not_of(' ', at);
                head[first] == '(')
                at = head.find(')', first) + 1;  // step past the result
        } else {
            at += 6;
        }
        at = head.find_first_not_of(' ', at);
        return trimmed(string_view(head).substr(at, head.find_first_of(" (", at) - at));
    }
    void add_global(const string& head, const string& value) {
        const Declared d = declared(head);
        Variable v{d.align, d.bytes, std::vector<u8>(d.bytes)};
        const int item_bytes = bytes_of(d.type);
        const bool list = !value.empty() && value[0] == '{';
        const Strings values = list ? split(value.substr(1, value.rfind('}') - 1))
                               : value.empty() ? Strings{}
                                               : Strings{value};
        for (size_t i = 0; i < values.size(); ++i) {
            const u64 x = is_literal(values[i]) ? bits_of(values[i], item_bytes) : 0;
            memcpy(&v.value[i * item_bytes], &x, item_bytes);
        }
        globals[d.name] = std::move(v);
    }
};
