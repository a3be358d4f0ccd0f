"""Formulas of oracle.py for whole arrays, at sizes that its loops are too slow for.

In float64, of shapes (..., N, D) or (..., N, N), with masks of what counts.
test_oracle.py holds them against the loops, and the gradients against differences.
"""

import numpy as np


def unit(x):
    """x / ||x||, or x itself when ||x|| = 0."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def cosine(x, y):
    """The cosine of each x_i and y_j, 0 when either norm is 0."""
    return unit(x) @ np.swapaxes(unit(y), -1, -2)


def softmax(scores, allowed=True, temperature=1.0):
    """softmax_j(s_ij / temperature) over the allowed j, 0 elsewhere."""
    top = np.where(allowed, scores, -1e300).max(-1, keepdims=True)
    shifted = np.where(allowed, scores - top, 0)
    e = np.where(allowed, np.exp(shifted / temperature), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def softmax_entropy(scores, allowed):
    """log(1+r) - t/(1+r) of each row over the allowed columns, as oracle.py has it."""
    scores = np.where(allowed, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    shifted = np.where(allowed, scores - top, 0)
    others = np.where(allowed, np.exp(shifted), 0)
    total = others.sum(-1)
    dominant = np.argmax(scores, axis=-1)[..., None]
    np.put_along_axis(others, dominant, 0, axis=-1)
    t = (others * shifted).sum(-1) / np.maximum(total, 1)
    return np.where(allowed.any(-1), np.log1p(others.sum(-1)) - t, 0)


def softmax_entropy_vjp(gradient, scores, allowed):
    """g_i p_ij (E[s] - s_ij), and the size of its terms; 0 where not allowed."""
    top = np.where(allowed, scores, -np.inf).max(-1, keepdims=True)
    d = np.where(allowed, scores - np.where(np.isfinite(top), top, 0), 0)
    e = np.where(allowed, np.exp(d), 0)
    total = np.maximum(e.sum(-1, keepdims=True), 1)
    mean = (e * d).sum(-1, keepdims=True) / total
    g = np.where(allowed.any(-1), gradient, 0).astype(np.float64)
    weight = np.where(allowed, g[..., None] * e / total, 0)
    return weight * (mean - d), abs(weight) * (1 - mean - d)


def attention_entropy_vjp(gradient, attention):
    """-g_i (log p_ij + H_i) / sum_j a_ij, p = a / sum a, and the size of its terms."""
    a, g = attention.astype(np.float64), gradient[..., None].astype(np.float64)
    total = np.maximum(a.sum(-1, keepdims=True), 1e-300)
    log_p = np.log(np.where(a > 0, a / total, 1))
    entropy = -(a / total * log_p).sum(-1, keepdims=True)
    wanted = np.where(a > 0, -g * (log_p + entropy) / total, 0)
    return wanted, np.where(a > 0, abs(g) * (abs(log_p) + entropy) / total, 0)


def saliency_vjp(gradient, entropy, valid, salient="low"):
    """The gradient of entropy (L, B, H, N), of g (B, N); what ties shares alike."""
    layers, _, heads, _ = entropy.shape
    out = np.zeros(entropy.shape)
    for layer, b in np.ndindex(entropy.shape[:2]):
        token = np.flatnonzero(valid[b])
        h = entropy[layer, b].astype(np.float64).mean(0)[token]
        if len(token) == 0 or h.min() == h.max():
            continue
        y, g = (h - h.min()) / (h.max() - h.min()), gradient[b, token]
        low, high = h == h.min(), h == h.max()
        slope = g - low * (g @ (1 - y)) / low.sum() - high * (g @ y) / high.sum()
        out[layer, b][:, token] = slope / (h.max() - h.min())
    return out / layers / heads * (1 if salient == "high" else -1)


def top_k(scores, valid, num_groups):
    """The places of the K largest valid scores, ascending; ties: the lower place."""
    order = np.argsort(-scores[valid].astype(np.float64), kind="stable")
    return np.sort(np.flatnonzero(valid)[order[:num_groups]])


def bipartite(tokens, num_groups):
    """ToMe until K, as oracle.py has it."""
    x = unit(tokens)
    groups = [[i] for i in range(len(x))]
    while len(groups) > max(num_groups, 1):
        mean = unit(np.stack([x[g].sum(0) for g in groups]))
        similarity = mean[::2] @ mean[1::2].T
        merges = min(len(groups) - num_groups, len(groups) // 2)
        for even in np.argsort(-similarity.max(-1), stable=True)[:merges]:
            groups[2 * similarity[even].argmax() + 1] += groups[2 * even]
            groups[2 * even] = None
        groups = sorted((g for g in groups if g), key=max)
    return groups


def contiguous(tokens, num_groups, protected=()):
    """Merge the neighbours of least ward cost (ties: the leftmost) until K groups."""
    x = unit(tokens)
    x = np.concatenate((x, np.eye(len(x))[:, ~x.any(-1)]), axis=-1)
    groups, alone = [[i] for i in range(len(x))], set(protected)

    def cost(a, b):
        if {a[0], b[0]} & alone:
            return np.inf
        gap = x[a].mean(0) - x[b].mean(0)
        return len(a) * len(b) / (len(a) + len(b)) * (gap @ gap)

    costs = [cost(a, b) for a, b in zip(groups[:-1], groups[1:], strict=True)]
    while len(groups) > num_groups and min(costs, default=np.inf) < np.inf:
        a = int(np.argmin(costs))
        groups[a] += groups.pop(a + 1)
        del costs[a]
        if a < len(costs):
            costs[a] = cost(groups[a], groups[a + 1])
        if a > 0:
            costs[a - 1] = cost(groups[a - 1], groups[a])
    return groups


def mlp(x, weight_in, bias_in, weight_out, bias_out):
    """W2 relu(W1 x + b1) + b2 of each row x, weights of shape (out, in)."""
    weights = weight_in, bias_in, weight_out, bias_out
    first, shift, second, offset = (w.astype(np.float64) for w in weights)
    return np.maximum(x @ first.T + shift, 0) @ second.T + offset
