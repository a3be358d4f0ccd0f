// cvt converts between integer types, between floating-point types, and between both.
// The modifier before the types rounds to a whole number: rni to nearest even, rzi
// towards zero, rmi down, rpi up.
#include "table.h"

namespace {

template <class D, class A>
void add_integer_pair(Table& table, const std::string& d, const std::string& a) {
    table["cvt." + d + "." + a] = unary<D, A>([](A x) { return D(x); });
}
template <class D>
void add_from_integers(Table& table, const std::string& d) {
    add_integer_pair<D, u8>(table, d, "u8");
    add_integer_pair<D, s8>(table, d, "s8");
    add_integer_pair<D, u16>(table, d, "u16");
    add_integer_pair<D, s16>(table, d, "s16");
    add_integer_pair<D, u32>(table, d, "u32");
    add_integer_pair<D, s32>(table, d, "s32");
    add_integer_pair<D, u64>(table, d, "u64");
    add_integer_pair<D, s64>(table, d, "s64");
}

template <class I, class F, bool ftz>
void add_to_integer(Table& table, const std::string& i, const std::string& f) {
    const auto add = [&](const std::string& rounding, Form form) {
        table["cvt." + rounding + (ftz ? ".ftz." : ".") + i + "." + f] = form;
    };
    add("rni",
        unary<I, F>([](F x) { return whole<I>(std::nearbyint(input<ftz>(x))); }));
    add("rzi", unary<I, F>([](F x) { return whole<I>(std::trunc(input<ftz>(x))); }));
    add("rmi", unary<I, F>([](F x) { return whole<I>(std::floor(input<ftz>(x))); }));
    add("rpi", unary<I, F>([](F x) { return whole<I>(std::ceil(input<ftz>(x))); }));
}
template <class I>
void add_with_floats(Table& table, const std::string& i) {
    table["cvt.f32." + i] = unary<f32, I>([](I x) { return f32(x); });
    table["cvt.f64." + i] = unary<f64, I>([](I x) { return f64(x); });
    add_to_integer<I, f32, false>(table, i, "f32");
    add_to_integer<I, f32, true>(table, i, "f32");
    add_to_integer<I, f64, false>(table, i, "f64");
}

// Round to a whole number that stays floating point.
template <class F, bool ftz>
void add_roundings(Table& table, const std::string& types) {
    const auto add = [&](const std::string& rounding, Form form) {
        table["cvt." + rounding + (ftz ? ".ftz." : ".") + types] = form;
    };
    add("rni",
        unary<F, F>([](F x) { return result<ftz>(std::nearbyint(input<ftz>(x))); }));
    add("rzi", unary<F, F>([](F x) { return result<ftz>(std::trunc(input<ftz>(x))); }));
    add("rmi", unary<F, F>([](F x) { return result<ftz>(std::floor(input<ftz>(x))); }));
    add("rpi", unary<F, F>([](F x) { return result<ftz>(std::ceil(input<ftz>(x))); }));
}

}  // namespace

void add_conversions(Table& table) {
    add_from_integers<u8>(table, "u8");
    add_from_integers<s8>(table, "s8");
    for_integers([&]<class T>(const char* type) { add_from_integers<T>(table, type); });

    add_with_floats<u8>(table, "u8");
    add_with_floats<u16>(table, "u16");
    add_with_floats<s16>(table, "s16");
    add_with_floats<u32>(table, "u32");
    add_with_floats<s32>(table, "s32");
    add_with_floats<u64>(table, "u64");
    add_with_floats<s64>(table, "s64");
    add_roundings<f32, false>(table, "f32.f32");
    add_roundings<f32, true>(table, "f32.f32");
    add_roundings<f64, false>(table, "f64.f64");

    table["cvt.f64.f32"] = unary<f64, f32>([](f32 x) { return f64(x); });
    table["cvt.ftz.f64.f32"] = unary<f64, f32>([](f32 x) { return f64(flush(x)); });
    table["cvt.f32.f64"] = unary<f32, f64>([](f64 x) { return canonical(f32(x)); });
    table["cvt.ftz.f32.f64"] =
        unary<f32, f64>([](f64 x) { return canonical(flush(f32(x))); });
    table["cvt.sat.f32.f32"] = unary<f32, f32>([](f32 x) { return saturated(x); });
    table["cvt.ftz.sat.f32.f32"] =
        unary<f32, f32>([](f32 x) { return saturated(flush(x)); });
    table["cvt.f32.f16"] =
        unary<f32, u16>([](u16 x) { return canonical(from_half(x)); });
    table["cvt.f16.f32"] = unary<u16, f32>([](f32 x) { return to_half(x); });
    table["cvt.f32.bf16"] =
        unary<f32, u16>([](u16 x) { return canonical(from_bfloat(x)); });
    table["cvt.bf16.f32"] = unary<u16, f32>([](f32 x) { return to_bfloat(x); });
}
