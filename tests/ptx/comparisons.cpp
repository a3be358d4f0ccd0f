// setp compares two registers and writes two predicates: the result and its opposite.
// and, or, xor, not and mov combine predicates.
#include "table.h"

namespace {

// Return the mask of the lanes where a word has its top bit set, 8 lanes at a time.
u32 lanes_of(const u32* words) {
    u32 lanes = 0;
    for (int i = 0; i < 4; ++i) {
        const __m256 eight =
            _mm256_load_ps(reinterpret_cast<const float*>(words) + 8 * i);
        lanes |= u32(_mm256_movemask_ps(eight)) << 8 * i;
    }
    return lanes;
}

template <class T, class F>
Form compare(F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        alignas(32) u32 words[LANES];
        const auto *a = w.at<T>(i.o[2]), *b = w.at<T>(i.o[3]);
        for (int l = 0; l < LANES; ++l)
            words[l] = F{}(from_slot<T>(a[l]), from_slot<T>(b[l])) ? ~0u : 0;
        const u32 holds = lanes_of(words);
        w.set(i.o[0], lanes, holds);
        w.set(i.o[1], lanes, ~holds);
    };
    return {run, {0, 0, form_of<T>, form_of<T>}};
}

template <class T>
void add_integers(Table& table, const std::string& type) {
    const auto add = [&](const char* name, Form form) {
        table["setp." + (name + type)] = form;
    };
    add("eq.", compare<T>([](T a, T b) { return a == b; }));
    add("ne.", compare<T>([](T a, T b) { return a != b; }));
    add("lt.", compare<T>([](T a, T b) { return a < b; }));
    add("le.", compare<T>([](T a, T b) { return a <= b; }));
    add("gt.", compare<T>([](T a, T b) { return a > b; }));
    add("ge.", compare<T>([](T a, T b) { return a >= b; }));
}

// A comparison with NaN is false. Those whose name ends with "u" (unordered) are then
// true instead: each is written as the negation of the opposite comparison.
template <class F, bool ftz>
void add_floats(Table& table, const std::string& type) {
    const auto add = [&](const char* name, auto f) {
        table["setp." + (name + type)] = compare<F>(
            [](F a, F b) { return decltype(f){}(input<ftz>(a), input<ftz>(b)); });
    };
    add("eq.", [](F a, F b) { return a == b; });
    add("ne.", [](F a, F b) { return (a < b) | (a > b); });
    add("lt.", [](F a, F b) { return a < b; });
    add("le.", [](F a, F b) { return a <= b; });
    add("gt.", [](F a, F b) { return a > b; });
    add("ge.", [](F a, F b) { return a >= b; });
    add("equ.", [](F a, F b) { return !((a < b) | (a > b)); });
    add("neu.", [](F a, F b) { return !(a == b); });
    add("ltu.", [](F a, F b) { return !(a >= b); });
    add("leu.", [](F a, F b) { return !(a > b); });
    add("gtu.", [](F a, F b) { return !(a <= b); });
    add("geu.", [](F a, F b) { return !(a < b); });
    add("num.", [](F a, F b) { return (a == a) & (b == b); });
    add("nan.", [](F a, F b) { return (a != a) | (b != b); });
}

template <class F>
Form logic(F, int sources) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        w.set(i.o[0], lanes, F{}(w.mask(i.o[1]), w.mask(i.o[i.operands - 1])));
    };
    return {run, std::vector<int>(sources + 1, 0)};
}

}  // namespace

void add_comparisons(Table& table) {
    for_integers([&]<class T>(const char* type) { add_integers<T>(table, type); });
    for (const std::string name : {"setp.eq.", "setp.ne."})
        for (const std::string width : {"16", "32", "64"})
            table[name + "b" + width] = table[name + "u" + width];
    add_floats<f32, false>(table, "f32");
    add_floats<f32, true>(table, "ftz.f32");
    add_floats<f64, false>(table, "f64");
    table["and.pred"] = logic([](u32 a, u32 b) { return a & b; }, 2);
    table["or.pred"] = logic([](u32 a, u32 b) { return a | b; }, 2);
    table["xor.pred"] = logic([](u32 a, u32 b) { return a ^ b; }, 2);
    table["not.pred"] = logic([](u32 a, u32) { return ~a; }, 1);
    table["mov.pred"] = logic([](u32 a, u32) { return a; }, 1);
}
