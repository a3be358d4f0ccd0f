// Rotation of vectors by their positions; see basic/rotary.cu for the formula and the
// shapes.
//
// One thread, one pair of elements, whose sine and cosine are computed once, or one
// element that does not change. The floor is one read and one write of every element.
extern "C" __global__ void rotate(const real_t* x, const long long* positions,
                                  const double* turns, long long rows, long long dim,
                                  long long pairs, long long interleaved,
                                  double scaling, real_t* out) {
    const long long index = thread_index();  // (rows, dim - pairs)
    const long long per_row = dim - pairs;
    if (index >= rows * per_row) return;
    const long long row = index / per_row, i = index % per_row, start = row * dim;
    if (i >= pairs) {
        out[start + pairs + i] = x[start + pairs + i];
        return;
    }

    // Subtract the whole turns in double. The rest is at most half a turn, so it keeps
    // its precision in acc_t.
    const double turn = positions[row] * turns[i];
    const acc_t angle = acc_t(6.283185307179586 * (turn - rint(turn)));
    const acc_t cosine = cos(angle), sine = sin(angle);
    const long long a = start + (interleaved ? 2 * i : i);
    const long long b = a + (interleaved ? 1 : pairs);
    const acc_t x0 = widen(x[a]), x1 = widen(x[b]);
    store(out + a, (x0 * cosine - x1 * sine) * acc_t(scaling));
    store(out + b, (x1 * cosine + x0 * sine) * acc_t(scaling));
}
