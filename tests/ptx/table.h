// Templates that make an instruction for a whole warp from a function of one lane.
#pragma once
#include "floats.h"
#include "warp.h"

void add_arithmetic(Table&);
void add_conversions(Table&);
void add_comparisons(Table&);

// Call f<T>(name) for each integer type that instructions compute with.
template <class F>
void for_integers(F f) {
    f.template operator()<u16>("u16"), f.template operator()<s16>("s16");
    f.template operator()<u32>("u32"), f.template operator()<s32>("s32");
    f.template operator()<u64>("u64"), f.template operator()<s64>("s64");
}

// Bytes of an operand of this type: narrow types take 4.
template <class T>
constexpr int form_of = sizeof(T) == 8 ? 8 : 4;

// F is a function without state. It takes the values of the sources of one lane and
// returns the result. D is the type of the result; A, B and C are those of the sources.
template <class D, class A, class F>
Form unary(F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<D>(i.o[0]);
        const auto* a = w.at<A>(i.o[1]);
        w.compute_lanes(lanes,
                        [=](int l) { d[l] = to_slot<D>(D(F{}(from_slot<A>(a[l])))); });
    };
    return {run, {form_of<D>, form_of<A>}};
}
template <class D, class A, class B, class F>
Form binary(F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<D>(i.o[0]);
        const auto* a = w.at<A>(i.o[1]);
        const auto* b = w.at<B>(i.o[2]);
        w.compute_lanes(lanes, [=](int l) {
            d[l] = to_slot<D>(D(F{}(from_slot<A>(a[l]), from_slot<B>(b[l]))));
        });
    };
    return {run, {form_of<D>, form_of<A>, form_of<B>}};
}
template <class D, class A, class B, class C, class F>
Form ternary(F) {
    const auto run = [](Warp& w, const Instruction& i, u32 lanes) {
        auto* d = w.at<D>(i.o[0]);
        const auto* a = w.at<A>(i.o[1]);
        const auto* b = w.at<B>(i.o[2]);
        const auto* c = w.at<C>(i.o[3]);
        w.compute_lanes(lanes, [=](int l) {
            d[l] = to_slot<D>(
                D(F{}(from_slot<A>(a[l]), from_slot<B>(b[l]), from_slot<C>(c[l]))));
        });
    };
    return {run, {form_of<D>, form_of<A>, form_of<B>, form_of<C>}};
}
