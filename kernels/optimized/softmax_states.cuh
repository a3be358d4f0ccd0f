// States (m, r, t) of SoftmaxEntropy: gathered from scores, merged between lanes, kept.

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// SoftmaxEntropy of scores in units of ln 2, whose exponential is one instruction.
struct Exponents {
    acc_t m = NEVER, r = 0, t = 0;

    // Add scores, of which masked ones are NEVER. One that equals m counts 1, but m
    // itself stays out: equals are counted apart, so that r never holds its 1.
    template <int count>
    __device__ __forceinline__ void add(const acc_t (&scores)[count]) {
        acc_t top = scores[0];
#pragma unroll
        for (int i = 1; i < count; ++i) top = max(top, scores[i]);
        int equals = 0;
        if (top > m) {
            const acc_t e = exp2(m - top);
            t = e * (t + (m - top) * (1 + r));
            r = e * (1 + r);
            m = top;
            equals = -1;
        }
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const acc_t d = scores[i] - m;
            const acc_t e = d < 0 ? exp2(d) : acc_t(0);
            equals += d == 0;
            r += e;
            t += e * d;
        }
        r += equals;
    }

    __device__ __forceinline__ SoftmaxEntropy natural() const {
        SoftmaxEntropy state;
        state.m = m == NEVER ? acc_t(NEVER) : m * acc_t(LN_2);
        state.r = r;
        state.t = t * acc_t(LN_2);
        return state;
    }
};

// Merge the states of lanes that differ in the bits from `first` up to `end`.
__device__ __forceinline__ SoftmaxEntropy merge_lanes(SoftmaxEntropy state, int first,
                                                      int end) {
    for (int bits = first; bits < end; bits *= 2) {
        SoftmaxEntropy other;
        other.m = __shfl_xor_sync(~0u, state.m, bits);
        other.r = __shfl_xor_sync(~0u, state.r, bits);
        other.t = __shfl_xor_sync(~0u, state.t, bits);
        state.merge(other);
    }
    return state;
}

__device__ __forceinline__ void write_state(acc_t* out, const SoftmaxEntropy& state) {
    out[0] = state.m;
    out[1] = state.r;
    out[2] = state.t;
}

__device__ __forceinline__ SoftmaxEntropy read_state(const acc_t* in) {
    SoftmaxEntropy state;
    state.m = in[0], state.r = in[1], state.t = in[2];
    return state;
}
