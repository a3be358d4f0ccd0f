"""The expected values of the tests of caches: formulas as plain float64 loops.

The functions take one head, without padding. They import nothing from the library.
"""

import math

import numpy as np


def scores(query, keys, bias, scale, causal):
    """s_ij = c q_i . k_j + b_j, or -inf for keys that query i does not see."""
    rows = []
    for i, q in enumerate(query):
        row = []
        for j, k in enumerate(keys):
            dot = math.fsum(float(a) * float(b) for a, b in zip(q, k, strict=True))
            seen = not causal or j <= len(keys) - len(query) + i
            row.append(dot * scale + float(bias[j]) if seen else -math.inf)
        rows.append(row)
    return rows


def log_sum_exp(row):
    """log sum_j e^s_j; -inf if every s_j is."""
    top = max(row)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(s - top) for s in row))


def attend(query, keys, values, bias=None, scale=None, causal=False):
    """Return o (T, d_v) and Z (T,)."""
    bias = [0.0] * len(keys) if bias is None else bias
    scale = query.shape[1] ** -0.5 if scale is None else scale
    output, z = [], []
    for row in scores(query, keys, bias, scale, causal):
        z.append(log_sum_exp(row))
        weights = [0.0 if z[-1] == -math.inf else math.exp(s - z[-1]) for s in row]
        columns = np.asarray(values, np.float64).T
        output.append(
            [math.fsum(w * v for w, v in zip(weights, c, strict=True)) for c in columns]
        )
    return np.array(output), np.array(z)


def attention(query, keys, scale=None, causal=True):
    """Return A (T, N)."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    rows = scores(query, keys, [0.0] * len(keys), scale, causal)
    return np.array([[math.exp(s - log_sum_exp(row)) for s in row] for row in rows])


def rotate(x, positions, inv_freq, interleaved=False):
    """Rotate vectors (N, d): pair i by the angle p f_i."""
    out, pairs = np.array(x, np.float64), len(inv_freq)
    for n, p in enumerate(positions):
        for i, f in enumerate(inv_freq):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            x0, x1 = float(x[n, a]), float(x[n, b])
            c, s = math.cos(float(p) * f), math.sin(float(p) * f)
            out[n, a], out[n, b] = x0 * c - x1 * s, x1 * c + x0 * s
    return out
