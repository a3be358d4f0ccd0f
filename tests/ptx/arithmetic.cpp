// Arithmetic of integers, bits and floating point. All operands are registers or
// constants. Each function below computes one lane, with the rules of the PTX ISA.
#include "table.h"

namespace {

// A shift by the width or more gives 0, or copies of the sign; C++ leaves it undefined.
template <class T>
T shifted_right(T a, u32 n) {
    constexpr u32 width = 8 * sizeof(T);
    const T last = T(a >> (width - 1));  // 0, or -1 of a negative number
    return n < width ? T(a >> n) : std::is_signed_v<T> ? last : T(0);
}
template <class T>
T shifted_left(T a, u32 n) {
    return n < 8 * sizeof(T) ? T(a << n) : T(0);
}
// bfi: replace `length` bits of b from `position` on by the low bits of a.
template <class T>
T field_inserted(T a, T b, u32 position, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    position &= 255, length &= 255;
    if (position >= width || length == 0) return b;
    const T ones = length < width ? T((T(1) << length) - 1) : T(~T(0));
    return T((b & ~T(ones << position)) | T((a & ones) << position));
}
// bfe: `length` bits of a from `position` on. Of a signed type, the top bit of the
// field is extended; bits beyond the top of a repeat its sign.
template <class T>
T field_extracted(T a, u32 position, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    position &= 255, length &= 255;
    const U sign = U(a) >> std::min(position + length - 1, width - 1) & 1;
    const U fill = std::is_signed_v<T> && length && sign ? ~U(0) : U(0);
    const U field = position < width ? U(U(a) >> position) : fill;
    if (length >= width) return T(length > width - position ? U(field) : field);
    const U ones = U((U(1) << length) - 1);
    return T((field & ones) | (fill & ~ones));
}
// C++ does not define division by 0, nor -2^(n-1) / -1. Here the first gives ones in
// all bits and the second wraps around.
template <class T>
T quotient(T a, T b) {
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
    return b == 0 ? T(-1) : T(a / b);
}
template <class T>
T remainder(T a, T b) {
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return 0;
    return b == 0 ? a : T(a % b);
}
// prmt: each selector of 4 bits chooses a byte of b:a, or copies of its sign.
u32 bytes_permuted(u32 a, u32 b, u32 selectors) {
    const u64 all = u64(b) << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 selector = selectors >> 4 * i & 15;
        u32 byte = u8(all >> 8 * (selector & 7));
        if (selector & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << 8 * i;
    }
    return d;
}
u32 bits_reversed(u32 x) {
    u32 r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
    return r;
}
// bfind: the position of the highest bit that is not a copy of the sign; ~0 without
// one.
template <class T>
u32 highest_bit(T a) {
    using U = std::make_unsigned_t<T>;
    const U x = std::is_signed_v<T> && a < 0 ? U(~U(a)) : U(a);
    return x ? 63 - std::countl_zero(u64(x)) : ~0u;
}
template <class T>
u32 shift_to_top(T a) {
    const u32 bit = highest_bit(a);
    return bit == ~0u ? bit : u32(8 * sizeof(T)) - 1 - bit;
}

template <class T>
void add_integers(Table& table, const std::string& type) {
    using U = std::make_unsigned_t<T>;
    using Product =
        std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    constexpr int width = 8 * sizeof(T);
    const auto add = [&](const char* name, Form form) { table[name + type] = form; };
    // Sums and low products wrap around, so unsigned types compute them.
    add("add.", binary<U, U, U>([](U a, U b) { return a + b; }));
    add("sub.", binary<U, U, U>([](U a, U b) { return a - b; }));
    add("mul.lo.", binary<U, U, U>([](U a, U b) { return U(u64(a) * b); }));
    add("mad.lo.",
        ternary<U, U, U, U>([](U a, U b, U c) { return U(u64(a) * b + c); }));
    add("mul.hi.",
        binary<T, T, T>([](T a, T b) { return T(Product(a) * b >> width); }));
    add("div.", binary<T, T, T>([](T a, T b) { return quotient(a, b); }));
    add("rem.", binary<T, T, T>([](T a, T b) { return remainder(a, b); }));
    add("min.", binary<T, T, T>([](T a, T b) { return a < b ? a : b; }));
    add("max.", binary<T, T, T>([](T a, T b) { return a > b ? a : b; }));
    add("neg.", unary<U, U>([](U a) { return U(0) - a; }));
    add("abs.", unary<U, T>([](T a) { return a < 0 ? U(0 - U(a)) : U(a); }));
    add("shr.", binary<T, T, u32>([](T a, u32 n) { return shifted_right(a, n); }));
    add("bfe.", ternary<T, T, u32, u32>(
                    [](T a, u32 p, u32 n) { return field_extracted(a, p, n); }));
    add("bfind.", unary<u32, T>([](T a) { return highest_bit(a); }));
    add("bfind.shiftamt.", unary<u32, T>([](T a) { return shift_to_top(a); }));
}
template <class T, class D>
void add_wide_products(Table& table, const std::string& type) {
    using U = std::make_unsigned_t<D>;
    table["mul.wide." + type] = binary<D, T, T>([](T a, T b) { return D(a) * D(b); });
    table["mad.wide." + type] =
        ternary<U, T, T, U>([](T a, T b, U c) { return U(D(a) * D(b)) + c; });
}

template <class T>
Form select() {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<T>(i.o[0]);
        const auto* a = w.at<T>(i.o[1]);
        const auto* b = w.at<T>(i.o[2]);
        const u32 selected = w.mask(i.o[3]);
        w.compute_lanes(lanes, [=](int l) { d[l] = selected >> l & 1 ? a[l] : b[l]; });
    };
    return {run, {form_of<T>, form_of<T>, form_of<T>, 0}};
}
template <class T>
Form insert_field() {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<T>(i.o[0]);
        const auto *a = w.at<T>(i.o[1]), *b = w.at<T>(i.o[2]);
        const auto *position = w.at<u32>(i.o[3]), *length = w.at<u32>(i.o[4]);
        w.compute_lanes(lanes, [=](int l) {
            d[l] = field_inserted<T>(T(a[l]), T(b[l]), position[l], length[l]);
        });
    };
    return {run, {form_of<T>, form_of<T>, form_of<T>, 4, 4}};
}
// lop3: any logical function of three bits. Bit n of `function` is the result for the
// inputs (a, b, c) whose bits spell n in binary.
void combine_bits(Warp& w, const Instruction& i, u32 lanes) {
    auto* d = w.at<u32>(i.o[0]);
    const auto *a = w.at<u32>(i.o[1]), *b = w.at<u32>(i.o[2]), *c = w.at<u32>(i.o[3]);
    const u32 function = *w.at<u32>(i.o[4]);
    w.compute_lanes(lanes, [=](int l) {
        u32 x = 0;
        for (int row = 0; row < 8; ++row)
            if (function >> row & 1)
                x |= (row & 4 ? a[l] : ~a[l]) & (row & 2 ? b[l] : ~b[l]) &
                     (row & 1 ? c[l] : ~c[l]);
        d[l] = x;
    });
}

template <class T>
void add_words(Table& table, const std::vector<std::string>& types) {
    for (const auto& type : types) {
        const auto add = [&](const char* name, Form form) {
            table[name + type] = form;
        };
        add("mov.", unary<T, T>([](T a) { return a; }));
        add("and.", binary<T, T, T>([](T a, T b) { return a & b; }));
        add("or.", binary<T, T, T>([](T a, T b) { return a | b; }));
        add("xor.", binary<T, T, T>([](T a, T b) { return a ^ b; }));
        add("not.", unary<T, T>([](T a) { return ~a; }));
        add("shl.", binary<T, T, u32>([](T a, u32 n) { return shifted_left(a, n); }));
        add("shr.", binary<T, T, u32>([](T a, u32 n) { return shifted_right(a, n); }));
        add("selp.", select<T>());
    }
}

// mov with braces: join `count` registers to one, the first in the lowest bits; or
// split one register into `count` parts.
template <class T, class Part, int count>
void pack(Warp& w, const Instruction& i, u32 lanes) {
    auto* d = w.at<T>(i.o[0]);
    const u32* parts[count];
    for (int n = 0; n < count; ++n) parts[n] = w.at<u32>(i.o[1 + n]);
    w.compute_lanes(lanes, [=](int l) {
        T x = 0;
        for (int n = 0; n < count; ++n)
            x |= T(Part(parts[n][l])) << 8 * sizeof(Part) * n;
        d[l] = x;
    });
}
template <class T, class Part, int count>
void unpack(Warp& w, const Instruction& i, u32 lanes) {
    T x[LANES];  // a copy: a part may be the register itself
    memcpy(x, w.at<T>(i.o[count]), sizeof x);
    for (int n = 0; n < count; ++n) {
        auto* d = w.at<u32>(i.o[n]);
        w.compute_lanes(lanes,
                        [&](int l) { d[l] = Part(x[l] >> 8 * sizeof(Part) * n); });
    }
}

// Arithmetic of 32-bit numbers with a carry: `in` reads it (addc), `out` writes it
// (.cc).
template <bool in, bool out, class F>
Form carrying(int sources, F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<u32>(i.o[0]);
        const auto *a = w.at<u32>(i.o[1]), *b = w.at<u32>(i.o[2]);
        const auto* c = w.at<u32>(i.o[i.operands - 1]);
        for_each_lane(lanes, [&](int l) {
            const u64 x =
                F{}(u64(a[l]), u64(b[l]), u64(c[l]), u64(in ? w.carry[l] : 0));
            d[l] = u32(x);
            if (out) w.carry[l] = x >> 32 & 1;
        });
    };
    return {run, std::vector<int>(sources + 1, 4)};
}
template <class F>
void add_carrying(Table& table, const std::string& name, const std::string& half,
                  int sources, F f) {
    for (const std::string type : {".u32", ".s32"}) {
        table[name + half + ".cc" + type] = carrying<false, true>(sources, f);
        table[name + "c" + half + type] = carrying<true, false>(sources, f);
        table[name + "c" + half + ".cc" + type] = carrying<true, true>(sources, f);
    }
}

// Floating point. Instructions named .approx may be inexact on a GPU, within bounds
// that PTX states; here all are computed to the last bit of a float.
template <class F, bool ftz>
void add_floats(Table& table, const std::string& type) {
    const auto add = [&](const char* name, Form form) { table[name + type] = form; };
    const auto one = [](auto f) {
        return unary<F, F>(
            [](F a) { return result<ftz>(decltype(f){}(input<ftz>(a))); });
    };
    const auto two = [](auto f) {
        return binary<F, F, F>([](F a, F b) {
            return result<ftz>(decltype(f){}(input<ftz>(a), input<ftz>(b)));
        });
    };
    const auto three = [](auto f) {
        return ternary<F, F, F, F>([](F a, F b, F c) {
            return result<ftz>(
                decltype(f){}(input<ftz>(a), input<ftz>(b), input<ftz>(c)));
        });
    };
    add("add.", two([](F a, F b) { return a + b; }));
    add("sub.", two([](F a, F b) { return a - b; }));
    add("mul.", two([](F a, F b) { return a * b; }));
    add("div.", two([](F a, F b) { return a / b; }));
    add("fma.", three([](F a, F b, F c) { return std::fma(a, b, c); }));
    add("rcp.", one([](F a) { return 1 / a; }));
    add("sqrt.", one([](F a) { return std::sqrt(a); }));
    add("min.", two([](F a, F b) { return smaller(a, b); }));
    add("max.", two([](F a, F b) { return larger(a, b); }));
    add("min.NaN.",
        two([](F a, F b) { return a != a || b != b ? a + b : smaller(a, b); }));
    add("max.NaN.",
        two([](F a, F b) { return a != a || b != b ? a + b : larger(a, b); }));
    add("neg.", unary<F, F>([](F a) { return input<ftz>(-a); }));
    add("abs.", unary<F, F>([](F a) { return input<ftz>(std::fabs(a)); }));
    if constexpr (sizeof(F) == 4) {
        add("ex2.approx.", one([](F a) { return exp2_of(a); }));
        add("lg2.approx.", one([](F a) { return log2_of(a); }));
        add("rcp.approx.", one([](F a) { return 1 / a; }));
        add("div.approx.", two([](F a, F b) { return a / b; }));
        add("div.full.", two([](F a, F b) { return a / b; }));
        add("sqrt.approx.", one([](F a) { return std::sqrt(a); }));
        add("rsqrt.approx.", one([](F a) { return F(1 / std::sqrt(f64(a))); }));
        const auto add_rounded = [&](const std::string& how, auto rounding) {
            constexpr Rounding to = decltype(rounding)::value;
            add(("add." + how).c_str(),
                two([](F a, F b) { return rounded_sum(a, b, to); }));
            add(("mul." + how).c_str(),  // products of f32 are exact in f64
                two([](F a, F b) { return rounded(f64(a) * b, 0, to); }));
            add(("fma." + how).c_str(),
                three([](F a, F b, F c) { return rounded_sum(f64(a) * b, c, to); }));
        };
        add_rounded("rz.", std::integral_constant<Rounding, Rounding::ZERO>());
        add_rounded("rm.", std::integral_constant<Rounding, Rounding::DOWN>());
        add_rounded("rp.", std::integral_constant<Rounding, Rounding::UP>());
    }
}

}  // namespace

void add_arithmetic(Table& table) {
    for_integers([&]<class T>(const char* type) { add_integers<T>(table, type); });
    add_wide_products<u16, u32>(table, "u16");
    add_wide_products<s16, s32>(table, "s16");
    add_wide_products<u32, u64>(table, "u32");
    add_wide_products<s32, s64>(table, "s32");
    add_words<u16>(table, {"b16"});
    add_words<u32>(table, {"b32"});
    add_words<u64>(table, {"b64"});
    // mov and selp only copy bits: all types of a width have the same handler.
    for (const std::string type : {"16", "32", "64", "f32", "f64"})
        for (const std::string sign : {"u", "s"}) {
            const bool is_float = type[0] == 'f';
            const std::string as = "b" + (is_float ? type.substr(1) : type);
            for (const std::string name : {"mov.", "selp."})
                table[name + (is_float ? type : sign + type)] = table[name + as];
        }
    table["bfi.b32"] = insert_field<u32>();
    table["bfi.b64"] = insert_field<u64>();
    table["lop3.b32"] = {combine_bits, {4, 4, 4, 4, 4}};
    table["prmt.b32"] = ternary<u32, u32, u32, u32>(
        [](u32 a, u32 b, u32 c) { return bytes_permuted(a, b, c); });
    table["brev.b32"] = unary<u32, u32>([](u32 a) { return bits_reversed(a); });
    table["clz.b32"] = unary<u32, u32>([](u32 a) { return std::countl_zero(a); });
    table["clz.b64"] = unary<u32, u64>([](u64 a) { return std::countl_zero(a); });
    table["popc.b32"] = unary<u32, u32>([](u32 a) { return std::popcount(a); });
    table["popc.b64"] = unary<u32, u64>([](u64 a) { return std::popcount(a); });
    table["shf.l.wrap.b32"] = ternary<u32, u32, u32, u32>(
        [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); });
    table["shf.r.wrap.b32"] = ternary<u32, u32, u32, u32>(
        [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); });

    table["pack.b32.x2"] = {pack<u32, u16, 2>, {}};
    table["pack.b64.x2"] = {pack<u64, u32, 2>, {}};
    table["pack.b64.x4"] = {pack<u64, u16, 4>, {}};
    table["unpack.b32.x2"] = {unpack<u32, u16, 2>, {}};
    table["unpack.b64.x2"] = {unpack<u64, u32, 2>, {}};
    table["unpack.b64.x4"] = {unpack<u64, u16, 4>, {}};

    add_carrying(table, "add", "", 2,
                 [](u64 a, u64 b, u64, u64 k) { return a + b + k; });
    add_carrying(table, "sub", "", 2,
                 [](u64 a, u64 b, u64, u64 k) { return a - b - k; });
    add_carrying(table, "mad", ".lo", 3,
                 [](u64 a, u64 b, u64 c, u64 k) { return u64(u32(a * b)) + c + k; });
    add_carrying(table, "mad", ".hi", 3,
                 [](u64 a, u64 b, u64 c, u64 k) { return (a * b >> 32) + c + k; });

    add_floats<f32, false>(table, "f32");
    add_floats<f32, true>(table, "ftz.f32");
    add_floats<f64, false>(table, "f64");
    table["rcp.approx.ftz.f64"] =
        unary<f64, f64>([](f64 a) { return coarse_reciprocal(a); });
    // The PTX ISA: "Copies the sign bit of a into the value of b." std::copysign takes
    // the sign from its second argument.
    table["copysign.f32"] =
        binary<f32, f32, f32>([](f32 a, f32 b) { return std::copysign(b, a); });
    table["copysign.f64"] =
        binary<f64, f64, f64>([](f64 a, f64 b) { return std::copysign(b, a); });
}
