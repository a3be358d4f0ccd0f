"""Formulas of oracle.py for whole arrays, at sizes where its loops are too slow.

They compute in float64, for shapes (..., N, D) or (..., N, N), with masks of the
elements that count. test_oracle.py compares them with the loops, and the gradients
with differences.
"""

import numpy as np


def unit(x):
    """x / ||x||, or x itself when ||x|| = 0."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def cosine(x, y):
    """Return the cosine of each x_i and y_j, 0 when either norm is 0."""
    return unit(x) @ np.swapaxes(unit(y), -1, -2)  # (..., N, M)


def softmax(scores, allowed=True, temperature=1.0):
    """softmax_j(s_ij / temperature) over the allowed j, 0 elsewhere."""
    # -1e300 instead of -inf: a row without allowed columns must not give inf - inf.
    top = np.where(allowed, scores, -1e300).max(-1, keepdims=True)
    shifted = np.where(allowed, scores - top, 0)
    e = np.where(allowed, np.exp(shifted / temperature), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def softmax_entropy(scores, allowed):
    """log(1+r) - t/(1+r) of each row over the allowed columns, as in oracle.py."""
    scores = np.where(allowed, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    shifted = np.where(allowed, scores - top, 0)
    others = np.where(allowed, np.exp(shifted), 0)
    total = others.sum(-1)  # Z = 1 + r
    # The dominant term is e^0 = 1. It is left out of r and added by log1p.
    dominant = np.argmax(scores, axis=-1)[..., None]
    np.put_along_axis(others, dominant, 0, axis=-1)
    # 1: a row with no allowed column.
    t = (others * shifted).sum(-1) / np.maximum(total, 1)
    return np.where(allowed.any(-1), np.log1p(others.sum(-1)) - t, 0)


def softmax_entropy_vjp(gradient, scores, allowed):
    """g_i p_ij (E[s] - s_ij), and the size of its terms; 0 where not allowed.

    The size bounds the rounding of a kernel: terms may be large and cancel.
    """
    top = np.where(allowed, scores, -np.inf).max(-1, keepdims=True)
    # s - max, finite everywhere.
    d = np.where(allowed, scores - np.where(np.isfinite(top), top, 0), 0)
    e = np.where(allowed, np.exp(d), 0)
    total = np.maximum(e.sum(-1, keepdims=True), 1)
    mean = (e * d).sum(-1, keepdims=True) / total
    g = np.where(allowed.any(-1), gradient, 0).astype(np.float64)
    weight = np.where(allowed, g[..., None] * e / total, 0)
    return weight * (mean - d), abs(weight) * (1 - mean - d)


def attention_received(attention, allowed):
    """(1/n_j) sum_i a_ij over the n_j allowed rows i, as in oracle.py; 0 without."""
    total = np.where(allowed, attention, 0).astype(np.float64).sum(-2)
    return total / np.maximum(allowed.sum(-2), 1)


def attention_received_vjp(gradient, attention, allowed):
    """a_ij (h_j - sum_k a_ik h_k), h = g / n, and the size of its terms.

    The gradient is that of the scores of a softmax. `attention` is 0 where it is not
    allowed.
    """
    count = allowed.sum(-2)
    h = np.where(count > 0, gradient, 0).astype(np.float64) / np.maximum(count, 1)
    h = h[..., None, :]  # of each column
    mean = (attention * h).sum(-1, keepdims=True)
    size = (attention * abs(h)).sum(-1, keepdims=True)
    return attention * (h - mean), attention * (abs(h) + size)


def attention_entropy_vjp(gradient, attention):
    """-g_i (log p_ij + H_i) / sum_j a_ij, p = a / sum a, and the size of its terms."""
    a, g = attention.astype(np.float64), gradient[..., None].astype(np.float64)
    total = np.maximum(a.sum(-1, keepdims=True), 1e-300)
    log_p = np.log(np.where(a > 0, a / total, 1))
    entropy = -(a / total * log_p).sum(-1, keepdims=True)
    # A probability of 0 gets no gradient: log p has no finite value there.
    expected = np.where(a > 0, -g * (log_p + entropy) / total, 0)
    return expected, np.where(a > 0, abs(g) * (abs(log_p) + entropy) / total, 0)


def saliency_vjp(gradient, entropy, valid, salient="low"):
    """Return the gradient of entropy (L, B, H, N) from g (B, N).

    Tokens that tie for the minimum or maximum get equal parts of its gradient.
    """
    layers, _, heads, _ = entropy.shape
    out = np.zeros(entropy.shape)
    for layer, b in np.ndindex(entropy.shape[:2]):
        token = np.flatnonzero(valid[b])
        # (N,), the mean over heads.
        h = entropy[layer, b].astype(np.float64).mean(0)[token]
        # A constant row is normalised to 0 whatever its value, so its gradient is
        # 0.
        if len(token) == 0 or h.min() == h.max():
            continue
        y, g = (h - h.min()) / (h.max() - h.min()), gradient[b, token]
        low, high = h == h.min(), h == h.max()
        # y = (h - min) / (max - min): dy_i/dmin = -(1 - y_i) / (max - min) and
        # dy_i/dmax = -y_i / (max - min).
        slope = g - low * (g @ (1 - y)) / low.sum() - high * (g @ y) / high.sum()
        out[layer, b][:, token] = slope / (h.max() - h.min())
    # Every head and layer enters with weight 1 / (L H); "low" is 1 minus the mean.
    return out / layers / heads * (1 if salient == "high" else -1)


def top_k(scores, valid, num_groups):
    """Return the indices of the K largest valid scores, ascending; ties: the lower."""
    # Stable: ties stay ascending.
    order = np.argsort(-scores[valid].astype(np.float64), kind="stable")
    return np.sort(np.flatnonzero(valid)[order[:num_groups]])


def bipartite(tokens, num_groups):
    """Return the groups of ToMe until K, as in oracle.py."""
    x = unit(tokens)
    groups = [[i] for i in range(len(x))]
    while len(groups) > max(num_groups, 1):
        mean = unit(np.stack([x[g].sum(0) for g in groups]))
        similarity = mean[::2] @ mean[1::2].T
        merges = min(len(groups) - num_groups, len(groups) // 2)
        # Stable: the lower index wins a tie.
        for even in np.argsort(-similarity.max(-1), stable=True)[:merges]:
            # The similarities are those before the step: groups that grow during it
            # keep their old means.
            groups[2 * similarity[even].argmax() + 1] += groups[2 * even]
            groups[2 * even] = None
        groups = sorted((g for g in groups if g), key=max)
    return groups


def contiguous(tokens, num_groups, protected=(), max_distance=np.inf):
    """Merge the neighbours of least ward cost (ties: the leftmost) until K groups.

    Stop earlier if the distance, the root of twice the cost, is above a maximum.
    """
    x = unit(tokens)
    # A zero token gets an axis of its own.
    x = np.concatenate((x, np.eye(len(x))[:, ~x.any(-1)]), axis=-1)
    groups, alone = [[i] for i in range(len(x))], set(protected)

    def cost(a, b):
        if {a[0], b[0]} & alone:
            return np.inf
        # The ward cost of units: n_a n_b / (n_a + n_b) times the squared gap of the
        # means.
        gap = x[a].mean(0) - x[b].mean(0)
        return len(a) * len(b) / (len(a) + len(b)) * (gap @ gap)

    costs = [cost(a, b) for a, b in zip(groups[:-1], groups[1:], strict=True)]
    while len(groups) > num_groups and min(costs, default=np.inf) < np.inf:
        a = int(np.argmin(costs))
        if np.sqrt(2 * costs[a]) > max_distance:
            break
        groups[a] += groups.pop(a + 1)
        del costs[a]
        # Only the two pairs beside the new group have another cost.
        if a < len(costs):
            costs[a] = cost(groups[a], groups[a + 1])
        if a > 0:
            costs[a - 1] = cost(groups[a - 1], groups[a])
    return groups


def mlp(x, weight_in, bias_in, weight_out, bias_out):
    """Return W2 relu(W1 x + b1) + b2 of each row x, weights of shape (out, in)."""
    weights = weight_in, bias_in, weight_out, bias_out
    first, shift, second, offset = (w.astype(np.float64) for w in weights)
    return np.maximum(x @ first.T + shift, 0) @ second.T + offset  # (..., out)
