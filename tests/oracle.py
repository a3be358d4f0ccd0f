"""The truth the library is tested against: every formula as plain float64 loops.

One sequence at a time, no masks, nothing vectorised, nothing taken from the library.
Sums go through `math.fsum`, so no result depends on the order of its terms.
"""

import math

import numpy as np

WORD = 0xFFFFFFFF  # 32 bits


# ---------------------------------------------------------------- vectors


def _rows(matrix):
    """The rows of a matrix as lists of Python floats."""
    return [[float(value) for value in row] for row in matrix]


def _dot(x, y):
    """sum_i x_i y_i."""
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _unit(x):
    """x / ||x||, or x itself when ||x|| = 0."""
    norm = math.hypot(*x)
    return [value / norm for value in x] if norm > 0 else list(x)


def _cosine(x, y):
    """x.y / (||x|| ||y||), or 0 when either norm is 0."""
    return _dot(_unit(x), _unit(y))


def _mean(vectors):
    """(1/n) sum_i x_i of a list of vectors."""
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def _mean_squared_error(x, y):
    """(1/D) sum_d (x_d - y_d)^2."""
    return math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)


def _min_max(values):
    """(v - min) / (max - min); a constant row gives 0."""
    low, high = min(values), max(values)
    if low == high:
        return [0.0 for _ in values]
    return [(value - low) / (high - low) for value in values]


def _argmax(values):
    """The place of the largest value; ties: the lower place."""
    best = 0
    for place, value in enumerate(values):
        if value > values[best]:
            best = place
    return best


# ---------------------------------------------------------------- entropy, saliency


def attention_entropy(attention):
    """H_i = -sum_j A_ij log A_ij in nats, with 0 log 0 = 0."""
    entropy = []
    for row in _rows(attention):
        entropy.append(math.fsum(-a * math.log(a) for a in row if a > 0))
    return np.array(entropy)


def query_key_entropy(query, key, causal=False, scale=None):
    """H_i of softmax_j(scale q_i.k_j), j <= i if causal; scale = 1/sqrt(d) if None."""
    query, key = _rows(query), _rows(key)
    if scale is None:
        scale = 1 / math.sqrt(len(query[0]))
    entropy = []
    for i, q in enumerate(query):
        scores = [scale * _dot(q, k) for k in (key[: i + 1] if causal else key)]
        entropy.append(_softmax_entropy(scores))
    return np.array(entropy)


def _softmax_entropy(scores):
    """log(1+r) - t/(1+r), r = sum e^(s-m), t = sum e^(s-m)(s-m), the max m left out."""
    top = _argmax(scores)
    shifted = [s - scores[top] for j, s in enumerate(scores) if j != top]
    r = math.fsum(math.exp(s) for s in shifted)
    t = math.fsum(math.exp(s) * s for s in shifted)
    return math.log1p(r) - t / (1 + r)


def self_attention_entropy(tokens):
    """H_i of softmax_j(x_i.x_j / sqrt(D))."""
    return query_key_entropy(tokens, tokens)


def saliency(entropy_layers, salient="low"):
    """s_i = 1 - (1/L) sum_l minmax(H^l)_i; salient="high": without the 1 -."""
    layers = [_min_max(row) for row in _rows(entropy_layers)]
    mean = _mean(layers)
    return np.array({"low": [1 - value for value in mean], "high": mean}[salient])


def norm_saliency(tokens):
    """s_i = minmax(||x||)_i."""
    return np.array(_min_max([math.hypot(*x) for x in _rows(tokens)]))


# ---------------------------------------------------------------- noise, selection


def philox4x32(counter4, key2):
    """Ten rounds of (c, k) -> (hi1^c1^k0, lo1, hi0^c3^k1, lo0); Salmon et al. 2011."""
    c0, c1, c2, c3 = counter4
    k0, k1 = key2
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, low0 = product0 >> 32, product0 & WORD
        high1, low1 = product1 >> 32, product1 & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def gumbel_noise(num_tokens, seed, sequence=0):
    """g = -log(-log u), u = (k + 1/2) 2^-23, k the top 23 bits of the first word."""
    seed, sequence = int(seed), int(sequence)
    key = (seed & WORD, seed >> 32)
    noise = []
    for token in range(num_tokens):
        counter = (token, sequence & WORD, 0, sequence >> 32)
        word = philox4x32(counter, key)[0]
        u = ((word >> 9) + 0.5) * 2.0**-23
        noise.append(np.float32(-math.log(-math.log(u))))
    return np.array(noise, dtype=np.float32)


def gumbel_softmax(saliency, noise, temperature):
    """pi = softmax((s + g) / temperature)."""
    scores = []
    for s, g in zip(saliency, noise, strict=True):
        scores.append((float(s) + float(g)) / temperature)
    powers = [math.exp(score - max(scores)) for score in scores]
    return np.array([power / math.fsum(powers) for power in powers])


def top_k_mask(scores, num_groups):
    """1 where fewer than K scores are larger (or equal at a lower index), else 0."""
    scores = [float(score) for score in scores]
    mask = []
    for i, own in enumerate(scores):
        ahead = 0
        for j, other in enumerate(scores):
            if other > own or (other == own and j < i):
                ahead += 1
        mask.append(1.0 if ahead < num_groups else 0.0)
    return np.array(mask)


def saliency_mass(saliency, probabilities, epsilon):
    """m_i = pi_i s_i + (1 - pi_i) epsilon."""
    mass = []
    for s, p in zip(saliency, probabilities, strict=True):
        mass.append(float(p) * float(s) + (1 - float(p)) * epsilon)
    return np.array(mass)


# ---------------------------------------------------------------- budget


def norm_mass(tokens, num_groups):
    """(the sum of the K largest ||x_i||) / (the sum of all ||x_i||), 1 of no norm."""
    norms = sorted((math.hypot(*x) for x in _rows(tokens)), reverse=True)
    whole = math.fsum(norms)
    return math.fsum(norms[:num_groups]) / whole if whole > 0 else 1.0


def norm_budget(tokens, gamma):
    """The least K >= 1 with norm_mass(X, K) >= gamma."""
    num_groups = 1
    while norm_mass(tokens, num_groups) < gamma:
        num_groups += 1
    return num_groups


# ---------------------------------------------------------------- clustering


def cosine_similarity(tokens):
    """S_ij = x_i.x_j / (||x_i|| ||x_j||), 0 when either norm is 0 (S_ii too)."""
    units = [_unit(x) for x in _rows(tokens)]
    return np.array([[_dot(u, v) for v in units] for u in units])


def _token_distance(x, y, method):
    """1 - cos, or for ward sqrt(2 - 2 cos), where 2 - 2 cos = ||u - v||^2 of units."""
    u, v = _unit(x), _unit(y)
    if not any(u) or not any(v):
        squared = 2.0  # a zero token: cos = 0
    else:
        squared = math.fsum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    return math.sqrt(squared) if method == "ward" else squared / 2


def _ward_update(sizes, distances):
    """sqrt(((n_k+n_a) d_ka^2 + (n_k+n_b) d_kb^2 - n_k d_ab^2) / (n_k+n_a+n_b))."""
    n_a, n_b, n_k = sizes
    d_ka, d_kb, d_ab = distances
    total = (n_k + n_a) * d_ka**2 + (n_k + n_b) * d_kb**2 - n_k * d_ab**2
    return math.sqrt(max(0.0, total / (n_k + n_a + n_b)))


def agglomerate(tokens, method):
    """[(A, B, d(A, B)), ...]: merge the closest two clusters; A has the first token."""
    tokens = _rows(tokens)
    clusters = [frozenset([i]) for i in range(len(tokens))]
    distance = {}  # of {A, B}, an unordered pair of clusters
    for i, x in enumerate(tokens):
        for j in range(i):
            pair = frozenset([clusters[i], clusters[j]])
            distance[pair] = _token_distance(x, tokens[j], method)
    first = dict(distance)
    merges = []
    while len(clusters) > 1:
        a, b = _closest(clusters, distance)
        merged = a | b
        merges.append((a, b, distance[frozenset([a, b])]))
        for c in clusters:
            if c not in (a, b):
                new = _cluster_distance(a, b, c, method, distance, first)
                distance[frozenset([merged, c])] = new
        clusters = [merged if c == a else c for c in clusters if c != b]
    return merges


def _closest(clusters, distance):
    """argmin d(A, B) over all pairs; ties: the first pair in the list's order."""
    best = None
    for i, a in enumerate(clusters):
        for b in clusters[i + 1 :]:
            height = distance[frozenset([a, b])]
            if best is None or height < best[0]:
                best = (height, a, b)
    return best[1], best[2]


def _cluster_distance(a, b, c, method, distance, first):
    """d(A|B, C): mean, max or min over the token pairs; ward by its recurrence."""
    if method == "ward":
        pairs = [(c, a), (c, b), (a, b)]
        known = [distance[frozenset(pair)] for pair in pairs]
        return _ward_update((len(a), len(b), len(c)), known)
    between = []
    for i in a | b:
        for j in c:
            between.append(first[frozenset([frozenset([i]), frozenset([j])])])
    if method == "average":
        return math.fsum(between) / len(between)
    return {"complete": max, "single": min}[method](between)


def _causal(groups):
    """Sorted groups, ordered by their last member's position."""
    return sorted((sorted(group) for group in groups), key=lambda group: group[-1])


def partition(merges, num_tokens, num_groups):
    """The K groups left after the first N - K merges, in causal order."""
    groups = {frozenset([i]) for i in range(num_tokens)}
    for a, b, _ in merges[: num_tokens - num_groups]:
        groups = (groups - {a, b}) | {a | b}
    return _causal(groups)


def labels_from_partition(groups, num_tokens):
    """label_i = k for every i in group k."""
    labels = np.full(num_tokens, -1)
    for k, group in enumerate(groups):
        for i in group:
            labels[i] = k
    return labels


def ward_error(tokens, groups):
    """(1/N) sum_k sum_{i in G_k} ||u_i - mean_k(u)||^2, u = x / ||x||, every x != 0."""
    units = [_unit(x) for x in _rows(tokens)]
    if any(not any(u) for u in units):
        raise ValueError("`ward_error` is defined for tokens that are not zero")
    squares = []
    for group in groups:
        centre = _mean([units[i] for i in group])
        for i in group:
            squares.extend((a - b) ** 2 for a, b in zip(units[i], centre, strict=True))
    return math.fsum(squares) / len(units)


def floored(mass):
    """max(m, max(m)/10^6); all 1 when all are 0."""
    mass = [float(m) for m in mass]
    if max(mass) == 0:
        return [1.0 for _ in mass]
    return [max(m, max(mass) / 1e6) for m in mass]


def orthogonal_units(tokens):
    """x / ||x||, and for each zero token a unit vector along an axis of its own."""
    tokens = _rows(tokens)
    zeros = [i for i, x in enumerate(tokens) if not any(x)]
    return [[*_unit(x), *(float(i == z) for z in zeros)] for i, x in enumerate(tokens)]


def _weighted_mean(units, group, mass):
    """sum_i m_i u_i / sum_i m_i over a group, and the sum of its masses."""
    weights = [mass[i] for i in sorted(group)]
    total = math.fsum(weights)
    columns = zip(*(units[i] for i in sorted(group)), strict=True)
    return [_dot(weights, column) / total for column in columns], total


def weighted_distance(units, a, c, mass, method):
    """sum m_i m_j (1-cos_ij) / (W_A W_C); ward: sqrt(2 W_A W_C/(W_A+W_C)) |mu-mu|."""
    (mean_a, w_a), (mean_c, w_c) = (_weighted_mean(units, g, mass) for g in (a, c))
    if method == "ward":
        return math.sqrt(2 * w_a * w_c / (w_a + w_c)) * math.dist(mean_a, mean_c)
    between = []
    for i in a:
        for j in c:
            gap = math.dist(units[i], units[j]) ** 2 / 2
            between.append(mass[i] * mass[j] * gap)
    return math.fsum(between) / (w_a * w_c)


def weighted_agglomerate(tokens, method, mass):
    """[(A, B, d(A, B)), ...]: every merge the cheapest of all pairs, found anew."""
    units, mass = orthogonal_units(tokens), floored(mass)
    clusters = [frozenset([i]) for i in range(len(units))]
    distance, merges = {}, []
    while len(clusters) > 1:
        for i, a in enumerate(clusters):
            for b in clusters[i + 1 :]:
                pair = frozenset([a, b])
                if pair not in distance:
                    distance[pair] = weighted_distance(units, a, b, mass, method)
        a, b = _closest(clusters, distance)
        merges.append((a, b, distance[frozenset([a, b])]))
        clusters = [a | b if c == a else c for c in clusters if c != b]
    return merges


def weighted_error(tokens, groups, mass):
    """(1/W) sum_k sum_{i in G_k} m_i ||u_i - mu_k||^2, mu_k the weighted mean."""
    units, mass = orthogonal_units(tokens), floored(mass)
    squares = []
    for group in groups:
        mean, _ = _weighted_mean(units, group, mass)
        squares.extend(mass[i] * math.dist(units[i], mean) ** 2 for i in group)
    return math.fsum(squares) / math.fsum(mass)


def bipartite(tokens, num_groups):
    """ToMe until K: the r = min(n-K, n//2) best even places join their best odd one."""
    units = [_unit(x) for x in _rows(tokens)]
    groups = [[i] for i in range(len(units))]
    while len(groups) > num_groups:
        vectors = [_mean([units[i] for i in group]) for group in groups]
        r = min(len(groups) - num_groups, len(groups) // 2)
        targets = _bipartite_step(vectors, r)
        merged = [list(group) for group in groups]
        for source, target in targets.items():
            merged[target].extend(groups[source])
        groups = _causal(g for place, g in enumerate(merged) if place not in targets)
    return _causal(groups)


def _bipartite_step(vectors, r):
    """{even place: odd place} of the r even places with the largest max_B cos."""
    odd = list(range(1, len(vectors), 2))
    matches = []
    for place in range(0, len(vectors), 2):
        row = [_cosine(vectors[place], vectors[other]) for other in odd]
        best = _argmax(row)
        matches.append((-row[best], place, odd[best]))
    return {place: target for _, place, target in sorted(matches)[:r]}


def contiguous(tokens, num_groups, protected=()):
    """Merge the neighbours of least ward cost (ties: the leftmost) until K groups."""
    units = [_unit(x) for x in _rows(tokens)]
    groups = [[i] for i in range(len(units))]
    while len(groups) > num_groups:
        members = [[units[i] for i in group] for group in groups]
        costs = [_ward_cost(a, b) for a, b in zip(members, members[1:], strict=False)]
        for place in range(len(costs)):
            if {groups[place][0], groups[place + 1][0]} & set(protected):
                costs[place] = math.inf
        place = costs.index(min(costs))
        groups[place : place + 2] = [groups[place] + groups[place + 1]]
    return groups


def _ward_cost(a, b):
    """n_a n_b/(n_a+n_b) (q_a/n_a^2 + q_b/n_b^2 - 2 S_a.S_b/(n_a n_b)), S = sum u."""
    n_a, n_b = len(a), len(b)
    sum_a = [math.fsum(column) for column in zip(*a, strict=True)]
    sum_b = [math.fsum(column) for column in zip(*b, strict=True)]
    q_a = _dot(sum_a, sum_a) + sum(not any(u) for u in a)  # a zero token is a unit
    q_b = _dot(sum_b, sum_b) + sum(not any(u) for u in b)  # vector of its own axis
    apart = q_a / n_a**2 + q_b / n_b**2 - 2 * _dot(sum_a, sum_b) / (n_a * n_b)
    return n_a * n_b / (n_a + n_b) * apart


def nearest(tokens, anchors):
    """Each token joins argmax_anchor cos (ties: the lower); anchors stay their own."""
    tokens = _rows(tokens)
    anchors = sorted(int(anchor) for anchor in anchors)
    groups = {anchor: [anchor] for anchor in anchors}
    for i, x in enumerate(tokens):
        if i not in groups:
            best = _argmax([_cosine(x, tokens[anchor]) for anchor in anchors])
            groups[anchors[best]].append(i)
    return _causal(groups.values())


# ---------------------------------------------------------------- merging


def merge(tokens, groups, mass):
    """sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j; the plain mean if the mass is 0.

    A group without members is 0.
    """
    tokens = _rows(tokens)
    merged = []
    for group in groups:
        if len(group) == 0:
            merged.append([0.0 for _ in tokens[0]])
            continue
        weights = [float(mass[j]) for j in group]
        if math.fsum(weights) == 0:
            weights = [1.0 for _ in group]
        columns = zip(*(tokens[j] for j in group), strict=True)
        total = math.fsum(weights)
        merged.append([_dot(weights, column) / total for column in columns])
    return np.array(merged)


def unmerge(merged, groups, num_tokens):
    """xhat_i = xmerged_k for every i in group k."""
    labels = labels_from_partition(groups, num_tokens)
    merged = _rows(merged)
    return np.array([merged[label] for label in labels])


# ---------------------------------------------------------------- alignment


def alignment_losses(merged, forward, backward):
    """mean_t MSE(f(mean x_1..t), x_t+1), mean_t MSE(g(mean x_t..K), x_t-1), the sum."""
    merged = _rows(merged)
    steps = len(merged) - 1
    if steps == 0:
        return 0.0, 0.0, 0.0
    ahead, behind = [], []
    for t in range(steps):
        guess = forward(np.array(_mean(merged[: t + 1])))
        ahead.append(_mean_squared_error(guess, merged[t + 1]))
    for t in range(steps, 0, -1):
        guess = backward(np.array(_mean(merged[t:])))
        behind.append(_mean_squared_error(guess, merged[t - 1]))
    forward_loss, backward_loss = math.fsum(ahead) / steps, math.fsum(behind) / steps
    return forward_loss, backward_loss, forward_loss + backward_loss


def mlp(x, weight_in, bias_in, weight_out, bias_out):
    """W2 relu(W1 x + b1) + b2, weights of shape (out, in)."""
    hidden = []
    for row, bias in zip(_rows(weight_in), bias_in, strict=True):
        hidden.append(max(0.0, math.fsum([_dot(row, x), bias])))
    output = []
    for row, bias in zip(_rows(weight_out), bias_out, strict=True):
        output.append(math.fsum([_dot(row, hidden), bias]))
    return np.array(output)


# ---------------------------------------------------------------- fidelity


def transformer(tokens, weights, num_heads, reverse, positions, sizes):
    """Predictions of a pre-norm transformer, a token and a head at a time."""
    of = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    order = range(len(tokens))

    def linear(name, x):
        return of[f"{name}.weight"] @ x + of[f"{name}.bias"]

    def norm(name, x):
        if f"{name}.bias" not in of:
            return x / math.sqrt((x * x).mean() + 1e-5) * of[f"{name}.weight"]
        centred = x - x.mean()
        scale = math.sqrt((centred * centred).mean() + 1e-5)
        return centred / scale * of[f"{name}.weight"] + of[f"{name}.bias"]

    def gelu(x):
        return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])

    def rotated(x, position):
        if "positions.weight" in of:
            return x
        half, y = len(x) // 2, x.copy()
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / len(x))
            turn = complex(math.cos(angle), math.sin(angle))
            pair = complex(x[i], x[i + half]) * turn
            y[i], y[i + half] = pair.real, pair.imag
        return y

    x = [linear("embed", np.asarray(t, np.float64)) for t in tokens]
    if "positions.weight" in of:
        x = [row + of["positions.weight"][positions[t]] for t, row in enumerate(x)]
    block = 0
    while f"blocks.{block}.qkv.weight" in of:
        name = f"blocks.{block}"
        parts = [
            np.split(linear(f"{name}.qkv", norm(f"{name}.norm1", row)), 3) for row in x
        ]
        heads = [[np.split(part, num_heads) for part in row] for row in parts]
        read = []
        for t in order:
            seen = [j for j in order if (j >= t if reverse else j <= t) and sizes[j]]
            out = []
            for h in range(num_heads):
                q = rotated(heads[t][0][h], positions[t])
                scores = [
                    q @ rotated(heads[j][1][h], positions[j]) / math.sqrt(len(q))
                    + math.log(sizes[j])
                    for j in seen
                ]
                p = [math.exp(score - max(scores)) for score in scores]
                total = sum(v * heads[j][2][h] for v, j in zip(p, seen, strict=True))
                out.append(total / sum(p) if seen else np.zeros(len(q)))
            read.append(np.concatenate(out))
        x = [row + linear(f"{name}.out", y) for row, y in zip(x, read, strict=True)]
        for t, row in enumerate(x):
            hidden = gelu(linear(f"{name}.mlp_in", norm(f"{name}.norm2", row)))
            x[t] = row + linear(f"{name}.mlp_out", hidden)
        block += 1
    return np.array([linear("head", norm("norm", row)) for row in x])


def reconstruction_error(tokens, merged, labels=None):
    """||X - Xhat||^2 / ||X||^2, xhat_i = merged[label_i], or of greatest cosine.

    Label -1 leaves a token out. What is rebuilt exactly has error 0, zeros too.
    """
    tokens, merged = _rows(tokens), _rows(merged)
    lost, whole = [], []
    for i, x in enumerate(tokens):
        if labels is None:
            label = _argmax([_cosine(x, y) for y in merged])
        else:
            label = int(labels[i])
        if label < 0:
            continue
        lost.extend((a - b) ** 2 for a, b in zip(x, merged[label], strict=True))
        whole.extend(a**2 for a in x)
    error, size = math.fsum(lost), math.fsum(whole)
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


def fidelity_loss(tokens_batch, merged_batch, gamma):
    """mean_b max(0, error_b - (1 - gamma)^2), error without labels."""
    losses = []
    for tokens, merged in zip(tokens_batch, merged_batch, strict=True):
        error = reconstruction_error(tokens, merged)
        losses.append(max(0.0, error - (1 - gamma) ** 2))
    return math.fsum(losses) / len(losses)
