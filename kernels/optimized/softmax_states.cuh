// States (m, r, t) of softmax entropies in base 2, whose exponential is one
// instruction: gathered from scores, merged between lanes, kept. See SoftmaxEntropy.
// Multiply-adds are written out: left to itself the compiler fuses now one product and
// now another, and the same sums would differ between kernels.

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// The lesser of two numbers, or the greater; NaN where the first is NaN.
__device__ __forceinline__ float lesser(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
    return least;
#else
    return x >= y ? y : x;
#endif
}
__device__ __forceinline__ float greater(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
    return most;
#else
    return x <= y ? y : x;
#endif
}
__device__ __forceinline__ double lesser(double x, double y) { return x >= y ? y : x; }
__device__ __forceinline__ double greater(double x, double y) { return x <= y ? y : x; }

// log2 of a number that is not subnormal, to 2^-22 of it or, near 1, of 1.
__device__ __forceinline__ float near_log2(float x) { return __log2f(x); }
__device__ __forceinline__ double near_log2(double x) { return log2(x); }

// Scores that are exponents of 2 as they come.
struct Exponents {
    __device__ __forceinline__ acc_t base(acc_t m) const { return m; }
    __device__ __forceinline__ acc_t above(acc_t score, acc_t base) const {
        return score - base;
    }
};

// Scores that `factor` makes exponents of 2, in the same instruction that subtracts.
struct ScaledExponents {
    acc_t factor;

    explicit __device__ __forceinline__ ScaledExponents(double scale)
        : factor(acc_t(scale * LOG2_E)) {}

    // What no token scores: times the factor below all exponents, and finite.
    __device__ __forceinline__ acc_t never() const {
        return max(MASKED_SCORE / factor, acc_t(-3e38f));
    }

    // m * factor, and of floats a little more, so that no exponent is above it, by
    // rounding or otherwise. `State::exact` takes it out again.
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
    acc_t m = MASKED_SCORE, r = 0, t = 0;

    // Add scores, in place of which then stand the losers, those that are not the
    // largest: every comparison of a score with m has one. So m stays out, and scores
    // that equal it do not. Sums are of exponents above base(m).
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
        const acc_t base = units.base(m);
        lift(before - base);
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = units.above(scores[i], base);
            const acc_t e = exp2(d);
            r += e;
            t = fma(e, d, t);
        }
    }

    // The same with fewer registers, of which doubles leave none: the scores stay, and
    // those that equal m are counted, m itself not.
    template <int count, class Units>
    __device__ __forceinline__ void add_doubles(acc_t (&scores)[count],
                                                const Units& units) {
        acc_t top = scores[0];
#pragma unroll
        for (int i = 1; i < count; ++i) top = max(top, scores[i]);
        int equals = 0;
        if (top > m) {
            ++r;
            lift(units.base(m) - units.base(top));
            m = top;
            equals = -1;
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

    // Let the sums be of exponents that are d more.
    __device__ __forceinline__ void lift(acc_t d) {
        const acc_t e = exp2(d);
        t = rounded_product(e, fma(d, r, t));
        r = rounded_product(e, r);
    }

    // m as an exponent of 2, and the sums of exponents above it and not above base(m).
    __device__ __forceinline__ State exact(const ScaledExponents& units) const {
        State state = *this;
        if (m == units.never()) {
            state.m = MASKED_SCORE;
            return state;  // it holds no score, or only NaN
        }
        state.m = rounded_product(m, units.factor);
        // Beyond 2^29 neighbouring scores are too far apart for it.
        state.lift(min(-units.above(m, units.base(m)), acc_t(100)));
        return state;
    }

    // Take in the terms of another state, of whom the larger m stays out. What holds no
    // score has m = MASKED_SCORE, so that its terms vanish.
    __device__ __forceinline__ void merge(const State& other) {
        const bool first = m >= other.m;
        const acc_t d = min(m, other.m) - max(m, other.m), e = exp2(d);
        const acc_t low_r = 1 + (first ? other.r : r), low_t = first ? other.t : t;
        t = fma(e, fma(d, low_r, low_t), first ? t : other.t);
        r = fma(e, low_r, first ? r : other.r);
        m = max(m, other.m);
    }

    // The entropy, in nats.
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

// Merge the states of lanes that differ in `bit`. Each then has half of them: the lane
// with the bit the upper half.
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

// Merge a thread's states of a fragment's four rows, whose other columns three more
// lanes have. Each of them writes one row to its place in `out` (rows, 3).
template <class Place>
__device__ __forceinline__ void write_rows(acc_t* out, State (&states)[4],
                                           Place place) {
    fold<4>(states, 1);
    fold<2>(states, 2);
    const int i = threadIdx.x % 2 * 2 + threadIdx.x / 2 % 2;
    write_state(out + place(i) * STATE_VALUES, states[0]);
}

// The same of the eight columns from the thread's j-th on, whose other rows seven more
// lanes have; `out` (columns, 3).
template <class Place>
__device__ __forceinline__ void write_columns(acc_t* out, State (&states)[8], int j,
                                              Place place) {
    fold<8>(states, 4);
    fold<4>(states, 8);
    fold<2>(states, 16);
    const int lane = threadIdx.x % 32;
    const int column = place(j + lane / 4 % 2 * 4 + lane / 8 % 2 * 2 + lane / 16);
    write_state(out + column * STATE_VALUES, states[0]);
}

// Merge two parts of a row or column, which lie `stride` apart, or four of them by
// pairs: as two tiles of half the rows do.
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
