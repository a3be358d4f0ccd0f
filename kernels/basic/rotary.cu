// Rotation of vectors by their positions (rotary position embedding, Su et al. 2021,
// arXiv:2104.09864).
//
// The first 2 `pairs` elements of a vector form pairs, (i, i + pairs) or, interleaved,
// (2i, 2i + 1). Pair i is rotated by position turns[i] full turns, and multiplied by
// `scaling`. The other elements do not change. One thread, one output.
// Shapes: x and out (rows, dim), positions (rows,), turns (pairs,).

extern "C" __global__ void rotate(const real_t* x, const long long* positions,
                                  const double* turns, long long rows, long long dim,
                                  long long pairs, long long interleaved,
                                  double scaling, real_t* out) {
    const long long index = thread_index();  // (rows, dim)
    if (index >= rows * dim) return;
    const long long row = index / dim, d = index % dim;
    if (d >= 2 * pairs) {
        out[index] = x[index];
        return;
    }

    const long long pair = interleaved ? d / 2 : d % pairs;
    const bool first = interleaved ? d % 2 == 0 : d < pairs;
    const long long partner = interleaved ? d ^ 1 : first ? d + pairs : d - pairs;
    // Reduce the angle to half a turn in double, before it becomes acc_t.
    const double turn = positions[row] * turns[pair];
    const acc_t angle = acc_t(6.283185307179586 * (turn - rint(turn)));
    const acc_t sine = first ? -sin(angle) : sin(angle);
    const acc_t y = widen(x[index]) * cos(angle) + widen(x[row * dim + partner]) * sine;
    store(out + index, y * acc_t(scaling));
}
