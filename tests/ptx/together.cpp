// Collective instructions, where lanes read each other's registers: shuffles, votes,
// matches and matrix products. The interpreter calls a handler once for each complete
// group of lanes, with the mask of the group.
#include "table.h"

void add_collectives(Table&);

namespace {

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// shfl.sync d|p, a, b, c, members: d is `a` of another lane, and p says whether that
// lane was in range. b is a distance, a mask or an index; c packs the limits of the
// range: a clamp in bits 0 to 4 and a segment mask in bits 8 to 12. Out of range, a
// lane keeps its own value.
template <Shuffle shuffle>
void shuffle_lanes(Warp& w, const Instruction& i, u32 lanes) {
    u32 value[LANES], from[LANES], in_range = 0;
    const auto *a = w.at<u32>(i.o[2]), *b = w.at<u32>(i.o[3]), *c = w.at<u32>(i.o[4]);
    memcpy(value, a, sizeof value);
    for (int l = 0; l < LANES; ++l) {
        const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
        const int limit = (l & segment) | (clamp & ~segment);
        const int source = shuffle == UP          ? l - by
                           : shuffle == DOWN      ? l + by
                           : shuffle == BUTTERFLY ? l ^ by
                                                  : (l & segment) | (by & ~segment);
        const bool ok = shuffle == UP ? source >= limit : source <= limit;
        from[l] = ok ? source : l;
        in_range |= u32(ok) << l;
    }
    auto* d = w.at<u32>(i.o[0]);
    for_each_lane(lanes, [&](int l) {
        if (!(lanes >> from[l] & 1))
            throw Fault("shuffle from lane " + std::to_string(from[l]) +
                            ", which is not active",
                        l);
        d[l] = value[from[l]];
    });
    w.set(i.o[1], lanes, in_range);
}

void ballot(Warp& w, const Instruction& i, u32 lanes) {
    const u32 votes = w.mask(i.o[1]) & lanes;
    auto* d = w.at<u32>(i.o[0]);
    w.compute_lanes(lanes, [=](int l) { d[l] = votes; });
}
void vote_any(Warp& w, const Instruction& i, u32 lanes) {
    w.set(i.o[0], lanes, w.mask(i.o[1]) & lanes ? ALL : 0);
}
void vote_all(Warp& w, const Instruction& i, u32 lanes) {
    w.set(i.o[0], lanes, (w.mask(i.o[1]) & lanes) == lanes ? ALL : 0);
}

// match.any: the mask of the lanes with the same value.
template <class T>
void match_any(Warp& w, const Instruction& i, u32 lanes) {
    u32 same[LANES];
    const auto* a = w.at<T>(i.o[1]);
    for_each_lane(lanes, [&](int l) {
        same[l] = 0;
        for_each_lane(lanes, [&](int k) { same[l] |= u32(a[k] == a[l]) << k; });
    });
    auto* d = w.at<u32>(i.o[0]);
    for_each_lane(lanes, [&](int l) { d[l] = same[l]; });
}

// The element types of mma.
struct Half {
    static constexpr int PACKED = 2;  // elements in one register
    static f32 of(u32 x, int n) { return from_half(u16(x >> 16 * n)); }
};
struct Bfloat {
    static constexpr int PACKED = 2;
    static f32 of(u32 x, int n) { return from_bfloat(u16(x >> 16 * n)); }
};
struct Tf32 {  // hardware may use or drop the last 13 bits; here they are dropped
    static constexpr int PACKED = 1;
    static f32 of(u32 x, int) { return float_of(x & ~0u << 13); }
};

// D (16, 8) = A (16, k) B (k, 8) + C. The PTX ISA, "Matrix Fragments for mma.m16n8k*",
// says which lane has which element: lane l has rows l / 4 and l / 4 + 8 of A, C and D,
// and column l / 4 of B. Products are exact and added in f64, and each sum is rounded
// to float once; hardware may round more often.
template <class Element, int k>
void multiply(Warp& w, const Instruction& i, u32 lanes) {
    if (lanes != ALL)
        throw Fault("mma needs all lanes of the warp", std::countr_zero(lanes));
    constexpr int packed = Element::PACKED, registers = k / (4 * packed);
    alignas(64) f64 a[16][k], b[k][8], sum[16][8];
    for (int r = 0; r < 2 * registers; ++r) {
        const auto* x = w.at<u32>(i.o[4 + r]);
        for (int l = 0; l < LANES; ++l)
            for (int n = 0; n < packed; ++n)
                a[l / 4 + r % 2 * 8][l % 4 * packed + n + r / 2 * 4 * packed] =
                    Element::of(x[l], n);
    }
    for (int r = 0; r < registers; ++r) {
        const auto* x = w.at<u32>(i.o[4 + 2 * registers + r]);
        for (int l = 0; l < LANES; ++l)
            for (int n = 0; n < packed; ++n)
                b[l % 4 * packed + n + r * 4 * packed][l / 4] = Element::of(x[l], n);
    }
    const u32* c = i.o + 4 + 3 * registers;
    for (int r = 0; r < 4; ++r) {
        const auto* x = w.at<u32>(c[r]);
        for (int l = 0; l < LANES; ++l)
            sum[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2] = float_of(x[l]);
    }
    for (int row = 0; row < 16; ++row)
        for (int n = 0; n < k; ++n)
            for (int column = 0; column < 8; ++column)
                sum[row][column] =
                    __builtin_fma(a[row][n], b[n][column], sum[row][column]);
    for (int r = 0; r < 4; ++r) {
        auto* d = w.at<u32>(i.o[r]);
        for (int l = 0; l < LANES; ++l)
            d[l] = bits(canonical(f32(sum[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2])));
    }
}

}  // namespace

void add_collectives(Table& table) {
    const auto add = [&](const char* name, Handler run, std::vector<int> bytes) {
        table[name] = {run, std::move(bytes)};
    };
    add("shfl.sync.up.b32", shuffle_lanes<UP>, {4, 0, 4, 4, 4, 4});
    add("shfl.sync.down.b32", shuffle_lanes<DOWN>, {4, 0, 4, 4, 4, 4});
    add("shfl.sync.bfly.b32", shuffle_lanes<BUTTERFLY>, {4, 0, 4, 4, 4, 4});
    add("shfl.sync.idx.b32", shuffle_lanes<INDEX>, {4, 0, 4, 4, 4, 4});
    add("vote.sync.ballot.b32", ballot, {4, 0, 4});
    add("vote.sync.any.pred", vote_any, {0, 0, 4});
    add("vote.sync.all.pred", vote_all, {0, 0, 4});
    add("match.any.sync.b32", match_any<u32>, {4, 4, 4});
    add("match.any.sync.b64", match_any<u64>, {4, 8, 4});
    const std::string mma = "mma.sync.aligned.m16n8";
    table[mma + "k16.row.col.f32.f16.f16.f32"] = {multiply<Half, 16>, {}};
    table[mma + "k16.row.col.f32.bf16.bf16.f32"] = {multiply<Bfloat, 16>, {}};
    table[mma + "k8.row.col.f32.f16.f16.f32"] = {multiply<Half, 8>, {}};
    table[mma + "k8.row.col.f32.bf16.bf16.f32"] = {multiply<Bfloat, 8>, {}};
    table[mma + "k8.row.col.f32.tf32.tf32.f32"] = {multiply<Tf32, 8>, {}};
}
