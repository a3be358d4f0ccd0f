// Online softmax states (m, r, t) in base 2: add scores, merge states between lanes and
// between warps, and turn a state into an entropy. See SoftmaxEntropy in common.cuh for
// the same state in base e. In base 2, with s in units of ln 2,
//
//   m   the largest score
//   r = sum 2^(s - m),  t = sum 2^(s - m) (s - m)      over all scores except one m
//
// because 2^x is one instruction. The sums r and t are those of base e, except that t
// is in units of ln 2.
//
// Every multiply-add is written as `fma` or as `rounded_product`. Otherwise the
// compiler would choose which products to fuse, differently in each kernel, and the
// same sums would have different bits. States are merged in a fixed order for the same
// reason.

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

// Return log2 of a number that is not subnormal. The error of the float version is at
// most 2^-22, relative to the result or, for numbers near 1, absolute.
__device__ __forceinline__ float near_log2(float x) { return __log2f(x); }
__device__ __forceinline__ double near_log2(double x) { return log2(x); }

// How `State::add` turns scores into exponents of 2: base(m) is the exponent that the
// sums refer to, and above(score, base) is a score's exponent relative to it.
//
// Exponents: the scores are exponents of 2 already.
struct Exponents {
    __device__ __forceinline__ acc_t base(acc_t m) const { return m; }
    __device__ __forceinline__ acc_t above(acc_t score, acc_t base) const {
        return score - base;
    }
};

// ScaledExponents: the exponent is score * factor. One fused multiply-add multiplies
// and subtracts the base.
struct ScaledExponents {
    acc_t factor;

    explicit __device__ __forceinline__ ScaledExponents(double scale)
        : factor(acc_t(scale * LOG2_E)) {}

    // The score of a masked position. Times the factor, it is finite and below all
    // exponents.
    __device__ __forceinline__ acc_t masked_score() const {
        return max(MASKED_SCORE / factor, acc_t(-3e38f));
    }

    // The base is m * factor, for floats plus 2^-23 of it. The product is rounded here
    // but not in the fused multiply-add of `above`; with the margin, no exponent is
    // above the base. `State::exact` removes the margin from the sums.
    __device__ __forceinline__ acc_t base(acc_t m) const {
        const acc_t exponent = rounded_product(m, factor);
        return sizeof(acc_t) == 8 ? exponent
                                  : fma(abs(exponent), acc_t(0x1p-23), exponent);
    }
    __device__ __forceinline__ acc_t above(acc_t score, acc_t base) const {
        if (sizeof(acc_t) == 8) return rounded_product(score, factor) - base;
        return fma(score, factor, -base);
    }
};

struct State {
    acc_t m = MASKED_SCORE, r = 0, t = 0;  // the sums are relative to base(m)

    // Add scores; this overwrites them. Exactly one score, the largest, must be left
    // out of the sums, while others that equal it belong in them. So each score is
    // compared with m: the greater of the two becomes m, and the lesser one replaces
    // the score. After all comparisons the array holds the scores to sum: all except
    // the largest, plus the m of before.
    template <int count, class Units>
    __device__ __forceinline__ void add(acc_t (&scores)[count], const Units& units) {
        if constexpr (sizeof(acc_t) == 8) {
            add_doubles(scores, units);
            return;
        }
        const acc_t before = units.base(m);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t score = scores[i];
            scores[i] = lesser(score, m);
            m = max(m, score);
        }
        // Refer the sums to the new base, then add the terms.
        const acc_t base = units.base(m);
        rescale(before - base);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = units.above(scores[i], base);
            const acc_t e = exp2(d);
            r += e;
            t = fma(e, d, t);
        }
    }

    // The same with fewer registers, because doubles take twice as many: the scores
    // stay as they are. Scores that equal m have d = 0 and add 1 to r each; they are
    // counted, and the one that became m is subtracted.
    template <int count, class Units>
    __device__ __forceinline__ void add_doubles(acc_t (&scores)[count],
                                                const Units& units) {
        acc_t top = scores[0];
#pragma unroll
        for (int i = 1; i < count; ++i) top = max(top, scores[i]);
        int equals = 0;
        if (top > m) {
            ++r;  // the m of before, which is now an ordinary score
            rescale(units.base(m) - units.base(top));
            m = top;
            equals = -1;  // the new m is left out
        }
        const acc_t base = units.base(m);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = units.above(scores[i], base);
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

    // Return the state with m as an exponent of 2 and with sums relative to m itself,
    // without the margin of base(m).
    __device__ __forceinline__ State exact(const ScaledExponents& units) const {
        State state = *this;
        if (m == units.masked_score()) {
            state.m = MASKED_SCORE;
            return state;  // it has no scores, or only NaN
        }
        state.m = rounded_product(m, units.factor);
        // The limit of 100 acts only on exponents beyond 2^29: neighbouring scores are
        // too far apart there for this correction.
        state.rescale(min(-units.above(m, units.base(m)), acc_t(100)));
        return state;
    }

    // Add the scores of another state. The larger m is left out of the sums; the
    // smaller one becomes an ordinary score, which is the 1 in low_r. A state without
    // scores has m = MASKED_SCORE, so its terms become 0.
    __device__ __forceinline__ void merge(const State& other) {
        const bool first = m >= other.m;
        const acc_t d = min(m, other.m) - max(m, other.m), e = exp2(d);
        const acc_t low_r = 1 + (first ? other.r : r), low_t = first ? other.t : t;
        t = fma(e, fma(d, low_r, low_t), first ? t : other.t);
        r = fma(e, low_r, first ? r : other.r);
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

// Merge the `count` states of each lane with those of its partner, the lane whose
// number differs in `bit`. Afterwards each lane has half of the merged states: the lane
// with the bit set has the upper half. Repeated for several bits, this merges all lanes
// and spreads the results over them.
template <int count>
__device__ __forceinline__ void fold(State* states, int bit) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
        const State a = states[i], b = states[i + count / 2];
        State kept, other;
        kept.m = upper ? b.m : a.m;
        kept.r = upper ? b.r : a.r;
        kept.t = upper ? b.t : a.t;
        other.m = __shfl_xor_sync(~0u, upper ? a.m : b.m, bit);
        other.r = __shfl_xor_sync(~0u, upper ? a.r : b.r, bit);
        other.t = __shfl_xor_sync(~0u, upper ? a.t : b.t, bit);
        kept.merge(other);
        states[i] = kept;
    }
}

// Merge and write the states of the rows of a warp's fragment. Each lane has states of
// four rows over its own 16 columns; the four lanes l / 4 * 4 + 0, 1, 2, 3 have the
// same rows and together all 64 columns. After two folds each of them has one row,
// which it writes to `out` (rows, 3); row_of(i) is the i-th row of the thread.
template <class RowOf>
__device__ __forceinline__ void write_rows(acc_t* out, State (&states)[4],
                                           RowOf row_of) {
    fold<4>(states, 1);
    fold<2>(states, 2);
    const int i = threadIdx.x % 2 * 2 + threadIdx.x / 2 % 2;
    write_state(out + row_of(i) * STATE_VALUES, states[0]);
}

// The same for columns. Each lane has states of eight columns, from its j-th on, over
// its own four rows; the eight lanes with the same l % 4 have the same columns and
// together all 32 rows. After three folds each of them has one column, which it writes
// to `out` (columns, 3).
template <class ColumnOf>
__device__ __forceinline__ void write_columns(acc_t* out, State (&states)[8], int j,
                                              ColumnOf column_of) {
    fold<8>(states, 4);
    fold<4>(states, 8);
    fold<2>(states, 16);
    const int lane = threadIdx.x % 32;
    const int column = column_of(j + lane / 4 % 2 * 4 + lane / 8 % 2 * 2 + lane / 16);
    write_state(out + column * STATE_VALUES, states[0]);
}

// Merge two partial states of a row or column, which lie `stride` values apart. Four
// are merged in pairs, because two `Half` tiles also merge pairs: the bits stay the
// same.
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
