// Online softmax states (m, r, t) in base 2: add scores, merge states between lanes and
// between warps, and turn a state into an entropy. `SoftmaxEntropy` in common.cuh is
// the same state in base e. Base 2 is used because 2^x is one instruction for floats.
// The scores s are in units of ln 2, which means score / ln 2:
//
//   m   the largest score
//   r = sum 2^(s - m)              over all scores except one with s = m
//   t = sum 2^(s - m) (s - m)      over the same scores
//
// r is equal to that of base e, and t is in units of ln 2.
//
// Every multiply-add is written as `fma` or as `rounded_product` (common.cuh).
// Otherwise the compiler would choose which products to fuse, differently in each
// kernel, and the same sums would have different bits. States are merged in a fixed
// order for the same reason.

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// Return the lesser or the greater of two numbers; NaN if the first one is NaN.
__device__ __forceinline__ float lesser(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float minimum;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(minimum) : "f"(x), "f"(y));
    return minimum;
#else
    return x >= y ? y : x;
#endif
}
__device__ __forceinline__ float greater(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float maximum;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(maximum) : "f"(x), "f"(y));
    return maximum;
#else
    return x <= y ? y : x;
#endif
}
__device__ __forceinline__ double lesser(double x, double y) { return x >= y ? y : x; }
__device__ __forceinline__ double greater(double x, double y) { return x <= y ? y : x; }

// Return log2 of a number that is not subnormal. For floats the error is at most 2^-22:
// relative to the result or, for numbers near 1, absolute.
__device__ __forceinline__ float approximate_log2(float x) { return __log2f(x); }
__device__ __forceinline__ double approximate_log2(double x) { return log2(x); }

// How `State::add` turns scores into exponents of 2: reference(m) is the exponent to
// which the sums are relative, and relative(score, reference) is the exponent of a
// score minus the reference. This difference is <= 0.
//
// `Exponents`: the scores are exponents of 2 already.
struct Exponents {
    __device__ __forceinline__ acc_t reference(acc_t m) const { return m; }
    __device__ __forceinline__ acc_t relative(acc_t score, acc_t reference) const {
        return score - reference;
    }
};

// `ScaledExponents`: the exponent is score * factor. One fused multiply-add multiplies
// and subtracts the reference.
struct ScaledExponents {
    acc_t factor;

    explicit __device__ __forceinline__ ScaledExponents(double scale)
        : factor(acc_t(scale * LOG2_E)) {}

    // The score of a masked position. Its product with the factor is below all
    // exponents. The limit of -3e38 keeps the score finite as a float if the factor is
    // small.
    __device__ __forceinline__ acc_t masked_score() const {
        return max(MASKED_SCORE / factor, acc_t(-3e38f));
    }

    // The reference is m * factor; for floats, |m * factor| 2^-23 is added as a margin.
    // The product is rounded here but not in the fused multiply-add of `relative`. The
    // margin is larger than the rounding error, so no exponent is above the reference.
    // `State::exact` removes the margin from the sums.
    __device__ __forceinline__ acc_t reference(acc_t m) const {
        const acc_t exponent = rounded_product(m, factor);
        return sizeof(acc_t) == 8 ? exponent
                                  : fma(abs(exponent), acc_t(0x1p-23), exponent);
    }
    __device__ __forceinline__ acc_t relative(acc_t score, acc_t reference) const {
        if (sizeof(acc_t) == 8) return rounded_product(score, factor) - reference;
        return fma(score, factor, -reference);
    }
};

struct State {
    acc_t m = MASKED_SCORE, r = 0, t = 0;  // r and t are relative to reference(m)

    // Add scores; this overwrites the array. Exactly one score, the largest, must be
    // left out of the sums; other scores that are equal to it belong in the sums. So
    // each score is compared with m: the greater of the two becomes m, and the lesser
    // one replaces the score. After all comparisons the array holds the scores to sum:
    // all except the largest, plus the old m.
    template <int count, class ToExponents>
    __device__ __forceinline__ void add(acc_t (&scores)[count],
                                        const ToExponents& exponents) {
        if constexpr (sizeof(acc_t) == 8) {
            add_doubles(scores, exponents);
            return;
        }
        const acc_t old_reference = exponents.reference(m);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t score = scores[i];
            scores[i] = lesser(score, m);
            m = max(m, score);
        }
        // Make the sums relative to the new reference, then add the terms.
        const acc_t reference = exponents.reference(m);
        rescale(old_reference - reference);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = exponents.relative(scores[i], reference);
            const acc_t e = exp2(d);
            r += e;
            t = fma(e, d, t);
        }
    }

    // Do the same with fewer registers, because doubles take twice as many. The scores
    // stay as they are. A score that is equal to m has d = 0 and adds 1 to r. `equals`
    // counts these scores, minus the one that became m.
    template <int count, class ToExponents>
    __device__ __forceinline__ void add_doubles(acc_t (&scores)[count],
                                                const ToExponents& exponents) {
        acc_t largest = scores[0];
#pragma unroll
        for (int i = 1; i < count; ++i) largest = max(largest, scores[i]);
        int equals = 0;
        if (largest > m) {
            ++r;  // the old m is now an ordinary score
            rescale(exponents.reference(m) - exponents.reference(largest));
            m = largest;
            equals = -1;  // leaves out the new m
        }
        const acc_t reference = exponents.reference(m);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = exponents.relative(scores[i], reference);
            const acc_t e = d < 0 ? exp2(d) : acc_t(0);
            equals += d == 0;
            r += e;
            t = fma(e, d, t);
        }
        r += equals;
    }

    // Add d to every exponent x in the sums r = sum 2^x and t = sum 2^x x:
    // r becomes 2^d r, and t becomes 2^d (t + d r).
    __device__ __forceinline__ void rescale(acc_t d) {
        const acc_t e = exp2(d);
        t = rounded_product(e, fma(d, r, t));
        r = rounded_product(e, r);
    }

    // Return the state with m as an exponent of 2, and with sums relative to m itself,
    // without the margin of reference(m).
    __device__ __forceinline__ State exact(const ScaledExponents& exponents) const {
        State state = *this;
        if (m == exponents.masked_score()) {
            state.m = MASKED_SCORE;
            return state;  // the state has no scores, or only NaN
        }
        state.m = rounded_product(m, exponents.factor);
        // The correction d is about |m * factor| 2^-23. The limit keeps 2^d finite. It
        // acts only if |m * factor| is above about 2^29. Neighbouring floats are 64
        // apart there, so the sums have no accuracy left to correct.
        state.rescale(min(-exponents.relative(m, exponents.reference(m)), acc_t(100)));
        return state;
    }

    // Add the scores of another state. The larger m is left out of the sums; the
    // smaller one becomes an ordinary score, which is the 1 in smaller_r. A state
    // without scores has m = MASKED_SCORE, so its terms become 0.
    __device__ __forceinline__ void merge(const State& other) {
        const bool own_is_larger = m >= other.m;
        const acc_t d = min(m, other.m) - max(m, other.m), e = exp2(d);
        const acc_t smaller_r = 1 + (own_is_larger ? other.r : r),
                    smaller_t = own_is_larger ? other.t : t;
        t = fma(e, fma(d, smaller_r, smaller_t), own_is_larger ? t : other.t);
        r = fma(e, smaller_r, own_is_larger ? r : other.r);
        m = max(m, other.m);
    }

    // Return the entropy, in nats; t is converted from units of ln 2.
    __device__ __forceinline__ acc_t value() const {
        SoftmaxEntropy state;
        state.r = r, state.t = t * acc_t(LN_2);
        return state.value();
    }
};

static_assert(sizeof(State) == STATE_VALUES * sizeof(acc_t));

__device__ __forceinline__ void write_state(acc_t* out, const State& state) {
    out[0] = state.m;
    out[1] = state.r;
    out[2] = state.t;
}

__device__ __forceinline__ State read_state(const acc_t* in) {
    State state;
    state.m = in[0], state.r = in[1], state.t = in[2];
    return state;
}

// Merge the `count` states of each lane with those of its partner, the lane whose index
// differs only in `bit` (a power of two). Afterwards each lane has half of the merged
// states: the lane with the bit set has the upper half, and its partner the lower half.
// Repeated for several bits, this merges the states of all these lanes and distributes
// the results over them.
template <int count>
__device__ __forceinline__ void fold(State* states, int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
        const State a = states[i], b = states[i + count / 2];
        State mine, received;
        mine.m = upper ? b.m : a.m;
        mine.r = upper ? b.r : a.r;
        mine.t = upper ? b.t : a.t;
        received.m = __shfl_xor_sync(~0u, upper ? a.m : b.m, bit);
        received.r = __shfl_xor_sync(~0u, upper ? a.r : b.r, bit);
        received.t = __shfl_xor_sync(~0u, upper ? a.t : b.t, bit);
        mine.merge(received);
        states[i] = mine;
    }
}

// Merge and write the states of the rows of a warp's fragment (32 x 64, tiles.cuh).
// Lane l has states of four rows over its own 16 columns; the four lanes with the same
// l / 4 have the same rows and together all 64 columns. After two folds each of these
// lanes has one row, which it writes to `out` (rows, 3). row_of(i) is the i-th row of
// the thread. The first fold (bit 1 of the lane) selects the upper or lower two of the
// four states, and the second fold (bit 2) one of these two, so i has the two bits in
// reverse order.
template <class RowOf>
__device__ __forceinline__ void write_row_states(acc_t* out, State (&states)[4],
                                                 RowOf row_of) {
    fold<4>(states, 1);
    fold<2>(states, 2);
    const int i = threadIdx.x % 2 * 2 + threadIdx.x / 2 % 2;
    write_state(out + row_of(i) * STATE_VALUES, states[0]);
}

// Merge and write the states of the columns of a warp's fragment. Lane l has states of
// eight columns, the first_j-th and the next seven of the thread, over its own four
// rows. The eight lanes with the same l % 4 have the same columns and together all 32
// rows. After three folds each of these lanes has one column, which it writes to `out`
// (columns, 3). The three bits of the lane are in reverse order, as in
// `write_row_states`.
template <class ColumnOf>
__device__ __forceinline__ void write_column_states(acc_t* out, State (&states)[8],
                                                    int first_j, ColumnOf column_of) {
    fold<8>(states, 4);
    fold<4>(states, 8);
    fold<2>(states, 16);
    const int lane = threadIdx.x % 32;
    const int column =
        column_of(first_j + lane / 4 % 2 * 4 + lane / 8 % 2 * 2 + lane / 16);
    write_state(out + column * STATE_VALUES, states[0]);
}

// Merge two partial states of a row or column, which lie `stride` values apart in
// `parts`. Four states are merged as two pairs, then the results of the pairs. With
// `HalfTile` (tiles.cuh) a block merges one pair, and a later kernel merges the results
// of the pairs. So the bits are the same.
__device__ __forceinline__ State merge_two(const acc_t* parts, int stride) {
    State merged = read_state(parts);
    merged.merge(read_state(parts + stride));
    return merged;
}
__device__ __forceinline__ State merge_four(const acc_t* parts, int stride) {
    State merged = merge_two(parts, stride);
    merged.merge(merge_two(parts + 2 * stride, stride));
    return merged;
}
