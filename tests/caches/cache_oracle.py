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
            # Exact products of float32 and narrower numbers, summed exactly.
            dot = math.fsum(float(a) * float(b) for a, b in zip(q, k, strict=True))
            # The queries are those of the last keys.
            seen = not causal or j <= len(keys) - len(query) + i
            row.append(dot * scale + float(bias[j]) if seen else -math.inf)
        rows.append(row)
    return rows


def log_sum_exp(row):
    """log sum_j e^s_j; -inf if every s_j is."""
    # The largest score is taken out, so that nothing overflows.
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
        # A query without keys has the output 0.
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
            # The two elements that rotate together.
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            x0, x1 = float(x[n, a]), float(x[n, b])
            c, s = math.cos(float(p) * f), math.sin(float(p) * f)
            out[n, a], out[n, b] = x0 * c - x1 * s, x1 * c + x0 * s
    return out


def attention_of_heads(query, keys, bias=None):
    """Return A (G, T, N) of G query heads (G, T, d) that read one key head (N, d)."""
    bias = [0.0] * len(keys) if bias is None else bias
    # Attention is causal: the queries are those of the last keys.
    rows = [scores(q, keys, bias, keys.shape[1] ** -0.5, True) for q in query]
    return np.array(
        [[[math.exp(s - log_sum_exp(r)) for s in r] for r in head] for head in rows]
    )


def score_received(query, keys, bias=None):
    a = attention_of_heads(query, keys, bias)
    group, num_queries, num_keys = a.shape
    out = []
    for j in range(num_keys):
        # Key j is seen by query i if it is not later than the query's own entry.
        seen = [i for i in range(num_queries) if j <= num_keys - num_queries + i]
        total = math.fsum(a[g, i, j] for g in range(group) for i in seen)
        out.append(total / (group * len(seen)))
    return np.array(out)


def score_rms(query, keys, bias=None):
    a = attention_of_heads(query[:, -256:], keys, bias)
    count = a.shape[0] * a.shape[1]
    squares = [
        math.fsum(x * x for x in column.ravel()) for column in a.transpose(2, 0, 1)
    ]
    return np.array([math.sqrt(x / count) for x in squares])


def score_last(query, keys, bias=None):
    # One query, which sees every key.
    a = attention_of_heads(query[:, -1:], keys, bias)
    return np.array([math.fsum(column) / len(column) for column in a[:, 0].T])


def score_max(query, keys, bias=None):
    # The largest over all heads that read the key head.
    return attention_of_heads(query, keys, bias).max((0, 1))


def score_snapkv(query, keys, bias=None):
    """The mean over the last 64 queries; the entries before theirs are pooled by 5."""
    query = query[:, -64:]
    a = attention_of_heads(query, keys, bias)
    # Entries before the window of the queries.
    before = len(keys) - query.shape[1]
    # Every query of the window sees all of them.
    mean = [math.fsum(a[:, :, j].ravel()) / a[:, :, j].size for j in range(before)]
    pooled = [
        math.fsum(mean[max(j - 2, 0) : j + 3]) / 5 for j in range(before)
    ]  # what is missing at the ends counts as 0
    # Without entries before the window, all scores are equal.
    top = max(pooled) if pooled else 1.0
    return np.array(pooled + [top] * query.shape[1])


def score_expected(query, keys, values, bias=None):
    c, num_keys = keys.shape[1] ** -0.5, len(keys)
    bias = [0.0] * num_keys if bias is None else bias
    # Each head has its own mean and covariance.
    mean_weights = np.zeros(num_keys)
    for q in np.asarray(query, np.float64):  # one head
        mu = q.mean(axis=0)
        # The covariance is that of the population: divided by T.
        sigma = np.mean([np.outer(row - mu, row - mu) for row in q], axis=0)
        # The mean of exp(c q.k) over Gaussian queries.
        s = [
            c * float(mu @ k) + c * c * float(k @ sigma @ k) / 2 + float(b)
            for k, b in zip(np.asarray(keys, np.float64), bias, strict=True)
        ]
        z = log_sum_exp(s)
        mean_weights += [math.exp(x - z) / len(query) for x in s]
    norms = [math.sqrt(math.fsum(float(x) ** 2 for x in v)) for v in values]
    return (mean_weights + 0.02 / num_keys) * np.array(norms)
