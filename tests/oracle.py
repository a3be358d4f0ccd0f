"""The expected values of the tests: every formula as plain float64 loops.

The functions take one sequence at a time, without masks. They use no vectorised code
and import nothing from the library, so a fault of the library cannot hide in both.
Sums go through `math.fsum`, so no result depends on the order of its terms.
"""

import math

import numpy as np

WORD = 0xFFFFFFFF  # keeps the low 32 bits of a Python integer


# ---------------------------------------------------------------- vectors


def _rows(matrix):
    """Return the rows of a matrix as lists of Python floats."""
    return [[float(value) for value in row] for row in matrix]


def _dot(x, y):
    """sum_i x_i y_i."""
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _unit(x):
    """x / ||x||, or x itself when ||x|| = 0."""
    # `hypot` scales its arguments, so the norm of very large or small values is
    # exact enough: x * x would overflow or become 0.
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
    """(v - min) / (max - min); a constant row is all 0."""
    low, high = min(values), max(values)
    # Without this case a constant row would divide 0 by 0.
    if low == high:
        return [0.0 for _ in values]
    return [(value - low) / (high - low) for value in values]


def _argmax(values):
    """Return the index of the largest value; the lower index wins a tie."""
    best = 0
    for index, value in enumerate(values):
        # Strict: an equal value at a higher index does not replace the first one.
        if value > values[best]:
            best = index
    return best


# ---------------------------------------------------------------- entropy, saliency


def attention_entropy(attention):
    """H_i = -sum_j A_ij log A_ij in nats, with 0 log 0 = 0."""
    entropy = []
    # The limit of a log a at a = 0 is 0, and log(0) itself would raise an error.
    for row in _rows(attention):
        entropy.append(math.fsum(-a * math.log(a) for a in row if a > 0))
    return np.array(entropy)


def query_key_entropy(query, key, causal=False, scale=None):
    """H_i of softmax_j(scale q_i.k_j), j <= i if causal; scale = 1/sqrt(d) if None."""
    query, key = _rows(query), _rows(key)
    if scale is None:
        # The usual scale of attention: the dot product of d values grows with
        # sqrt(d).
        scale = 1 / math.sqrt(len(query[0]))
    entropy = []
    for i, q in enumerate(query):
        # A causal query i attends to the keys 0 to i, itself included.
        scores = [scale * _dot(q, k) for k in (key[: i + 1] if causal else key)]
        entropy.append(_softmax_entropy(scores))
    return np.array(entropy)


def _softmax_entropy(scores):
    """log(1+r) - t/(1+r), r = sum e^(s-m), t = sum e^(s-m)(s-m), without the max m."""
    # The entropy of a softmax is log(Z) - t / Z with Z = 1 + r, where the 1 is e^0
    # of the largest score. If one score dominates, r is tiny: log(1 + r) would lose
    # it, and log1p keeps it.
    top = _argmax(scores)
    shifted = [s - scores[top] for j, s in enumerate(scores) if j != top]
    r = math.fsum(math.exp(s) for s in shifted)
    t = math.fsum(math.exp(s) * s for s in shifted)
    return math.log1p(r) - t / (1 + r)


def attention_received(attention, causal=False):
    """r_j = (1/n_j) sum_i A_ij over all i, or over i >= j if causal."""
    columns = list(zip(*_rows(attention), strict=True))
    # Row i of a causal attention belongs to query i, which attends to the keys j <= i.
    seen = [column[j:] if causal else column for j, column in enumerate(columns)]
    return np.array([math.fsum(column) / len(column) for column in seen])


def query_key_received(query, key, causal=False, scale=None):
    """r_j of A_ij = softmax_j(scale q_i.k_j), as in query_key_entropy."""
    query, key = _rows(query), _rows(key)
    scale = 1 / math.sqrt(len(query[0])) if scale is None else scale
    attention = np.zeros((len(query), len(key)))
    for i, q in enumerate(query):
        scores = [scale * _dot(q, k) for k in (key[: i + 1] if causal else key)]
        exps = [math.exp(s - max(scores)) for s in scores]
        attention[i, : len(exps)] = [e / math.fsum(exps) for e in exps]
    return attention_received(attention, causal)


def self_attention_entropy(tokens):
    """H_i of softmax_j(x_i.x_j / sqrt(D)): each token is its own query and key."""
    return query_key_entropy(tokens, tokens)


def saliency(entropy_layers, salient="low"):
    """s_i = 1 - (1/L) sum_l minmax(H^l)_i; salient="high": without the 1 -."""
    layers = [_min_max(row) for row in _rows(entropy_layers)]  # (L, N)
    # The mean over layers comes after the normalisation, so every layer counts the
    # same, whatever the range of its entropy.
    mean = _mean(layers)
    return np.array({"low": [1 - value for value in mean], "high": mean}[salient])


def norm_saliency(tokens):
    """s_i = minmax(||x||)_i."""
    return np.array(_min_max([math.hypot(*x) for x in _rows(tokens)]))


# ---------------------------------------------------------------- noise, selection


# The multipliers and key increments are those of Philox4x32 in the paper. NumPy's
# `Philox` is the 4x64 variant, so it cannot serve as the expected value.
def philox4x32(counter4, key2):
    """Ten rounds of (c, k) -> (hi1^c1^k0, lo1, hi0^c3^k1, lo0); Salmon et al. 2011."""
    c0, c1, c2, c3 = counter4
    k0, k1 = key2
    for _ in range(10):
        # Each product has 64 bits: the high and the low word are both used.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, low0 = product0 >> 32, product0 & WORD
        high1, low1 = product1 >> 32, product1 & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        # The increments are the golden ratio and sqrt(3) - 1, times 2^32.
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def gumbel_noise(num_tokens, seed, sequence=0):
    """g = -log(-log u), u = (k + 1/2) 2^-23, k the top 23 bits of the first word."""
    seed, sequence = int(seed), int(sequence)
    key = (seed & WORD, seed >> 32)  # a seed has up to 64 bits, a word 32
    noise = []
    for token in range(num_tokens):
        # A token's noise depends on its own position and sequence only, so it is
        # the same in every batch.
        counter = (token, sequence & WORD, 0, sequence >> 32)
        word = philox4x32(counter, key)[0]
        # The half keeps u away from 0 and 1, where log(-log u) is infinite.
        u = ((word >> 9) + 0.5) * 2.0**-23
        noise.append(np.float32(-math.log(-math.log(u))))
    return np.array(noise, dtype=np.float32)


def gumbel_softmax(saliency, noise, temperature):
    """pi = softmax((s + g) / temperature)."""
    scores = []
    for s, g in zip(saliency, noise, strict=True):
        scores.append((float(s) + float(g)) / temperature)
    # The largest score is subtracted first, so that exp cannot overflow.
    powers = [math.exp(score - max(scores)) for score in scores]
    return np.array([power / math.fsum(powers) for power in powers])


def top_k_mask(scores, num_groups):
    """1 if fewer than K scores are larger (or equal at a lower index), else 0."""
    scores = [float(score) for score in scores]
    mask = []
    for i, current in enumerate(scores):
        rank = 0
        for j, other in enumerate(scores):
            if other > current or (other == current and j < i):
                rank += 1
        mask.append(1.0 if rank < num_groups else 0.0)
    return np.array(mask)


def attention_mass(received, entropy, causal=False):
    """r_i exp(-H_i) of (L, H, N): r and H are means over layers and heads.

    Times i + 1, the number of tokens that token i attends to, if attention is causal.
    """
    count = len(received) * len(received[0])
    mass = []
    for i in range(len(received[0][0])):
        r = math.fsum(float(head[i]) for layer in received for head in layer) / count
        h = math.fsum(float(head[i]) for layer in entropy for head in layer) / count
        mass.append(r * math.exp(-h) * (i + 1 if causal else 1))
    return np.array(mass)


def saliency_mass(saliency, probabilities, epsilon):
    """m_i = pi_i s_i + (1 - pi_i) epsilon."""
    mass = []
    for s, p in zip(saliency, probabilities, strict=True):
        mass.append(float(p) * float(s) + (1 - float(p)) * epsilon)
    return np.array(mass)


# ---------------------------------------------------------------- budget


def norm_mass(tokens, num_groups):
    """(the sum of the K largest ||x_i||) / (the sum of all); 1 if every norm is 0."""
    norms = sorted((math.hypot(*x) for x in _rows(tokens)), reverse=True)
    whole = math.fsum(norms)
    return math.fsum(norms[:num_groups]) / whole if whole > 0 else 1.0


def norm_budget(tokens, gamma):
    """The least K >= 1 with norm_mass(X, K) >= gamma."""
    # K grows by one at a time; the loop ends because norm_mass(X, N) = 1 >= gamma.
    num_groups = 1
    while norm_mass(tokens, num_groups) < gamma:
        num_groups += 1
    return num_groups


# ---------------------------------------------------------------- clustering


def cosine_similarity(tokens):
    """S_ij = x_i.x_j / (||x_i|| ||x_j||), 0 when either norm is 0 (also S_ii)."""
    units = [_unit(x) for x in _rows(tokens)]
    return np.array([[_dot(u, v) for v in units] for u in units])


def _token_distance(x, y, method):
    """1 - cos, or for ward sqrt(2 - 2 cos), where 2 - 2 cos = ||u - v||^2 of units."""
    u, v = _unit(x), _unit(y)
    if not any(u) or not any(v):
        squared = 2.0  # a zero token: cos = 0
    else:
        # From the difference of units: 1 - u.v loses all digits for nearly parallel
        # tokens.
        squared = math.fsum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    return math.sqrt(squared) if method == "ward" else squared / 2


def _ward_update(sizes, distances):
    """sqrt(((n_k+n_a) d_ka^2 + (n_k+n_b) d_kb^2 - n_k d_ab^2) / (n_k+n_a+n_b)).

    The recurrence of Lance and Williams for ward, as SciPy has it.
    """
    n_a, n_b, n_k = sizes
    d_ka, d_kb, d_ab = distances
    total = (n_k + n_a) * d_ka**2 + (n_k + n_b) * d_kb**2 - n_k * d_ab**2
    # Rounding can make the total slightly negative.
    return math.sqrt(max(0.0, total / (n_k + n_a + n_b)))


def agglomerate(tokens, method):
    """Return [(A, B, d(A, B)), ...] of the N - 1 merges, the closest pair each time.

    A is the cluster that has the lower first token.
    """
    tokens = _rows(tokens)
    clusters = [frozenset([i]) for i in range(len(tokens))]
    distance = {}  # of {A, B}, an unordered pair of clusters
    for i, x in enumerate(tokens):
        for j in range(i):
            pair = frozenset([clusters[i], clusters[j]])
            distance[pair] = _token_distance(x, tokens[j], method)
    # The distances of single tokens: average, complete and single need no others.
    first = dict(distance)
    merges = []
    while len(clusters) > 1:
        a, b = _closest(clusters, distance)
        # Every remaining cluster gets its distance to the new one.
        merged = a | b
        merges.append((a, b, distance[frozenset([a, b])]))
        for c in clusters:
            # Old entries stay in the dictionary: no list of clusters names them
            # again.
            if c not in (a, b):
                new = _cluster_distance(a, b, c, method, distance, first)
                distance[frozenset([merged, c])] = new
        # The merged cluster takes the slot of `a`, so the list stays in the order
        # of the clusters' first tokens, which the rule for ties relies on.
        clusters = [merged if c == a else c for c in clusters if c != b]
    return merges


def _closest(clusters, distance):
    """argmin d(A, B) over all pairs; ties: the first pair in the list's order."""
    best = None
    for i, a in enumerate(clusters):
        for b in clusters[i + 1 :]:
            height = distance[frozenset([a, b])]
            # Strict: the first pair of equal distance stays.
            if best is None or height < best[0]:
                best = (height, a, b)
    return best[1], best[2]


def _cluster_distance(a, b, c, method, distance, first):
    """d(A|B, C): mean, max or min over the token pairs; ward by its recurrence."""
    if method == "ward":
        pairs = [(c, a), (c, b), (a, b)]
        known = [distance[frozenset(pair)] for pair in pairs]
        return _ward_update((len(a), len(b), len(c)), known)
    # The other methods follow from the token pairs directly. The library updates
    # the distances step by step, so the two computations are independent.
    between = []
    for i in a | b:
        for j in c:
            between.append(first[frozenset([frozenset([i]), frozenset([j])])])
    if method == "average":
        return math.fsum(between) / len(between)
    return {"complete": max, "single": min}[method](between)


def _causal(groups):
    """Return sorted groups in the order of their last members.

    With this order a merged token never contains a token later than its own position.
    """
    return sorted((sorted(group) for group in groups), key=lambda group: group[-1])


def partition(merges, num_tokens, num_groups):
    """The K groups left after the first N - K merges, in causal order."""
    groups = {frozenset([i]) for i in range(num_tokens)}
    # The number of clusters falls by one at each merge, so N - K merges leave K.
    for a, b, _ in merges[: num_tokens - num_groups]:
        groups = (groups - {a, b}) | {a | b}
    return _causal(groups)


def labels_from_partition(groups, num_tokens):
    """label_i = k for every i in group k."""
    labels = np.full(num_tokens, -1)  # -1: in no group
    for k, group in enumerate(groups):
        for i in group:
            labels[i] = k
    return labels


def ward_error(tokens, groups):
    """(1/N) sum_k sum_{i in G_k} ||u_i - mean_k(u)||^2, u = x / ||x||, every x != 0."""
    units = [_unit(x) for x in _rows(tokens)]
    # A zero token has no unit vector; `weighted_error` defines one for it.
    if any(not any(u) for u in units):
        raise ValueError("`ward_error` is defined for tokens that are not zero")
    squares = []
    for group in groups:
        centre = _mean([units[i] for i in group])
        for i in group:
            squares.extend((a - b) ** 2 for a, b in zip(units[i], centre, strict=True))
    return math.fsum(squares) / len(units)


def floored(mass):
    """max(m, max(m)/10^6); all 1 if all are 0."""
    mass = [float(m) for m in mass]
    # Without any mass every token counts the same.
    if max(mass) == 0:
        return [1.0 for _ in mass]
    return [max(m, max(mass) / 1e6) for m in mass]  # no token disappears completely


def orthogonal_units(tokens):
    """x / ||x||; each zero token becomes a unit vector along an axis of its own.

    Its cosine to every other token is then 0, as `cosine_similarity` defines it.
    """
    tokens = _rows(tokens)
    zeros = [i for i, x in enumerate(tokens) if not any(x)]
    return [[*_unit(x), *(float(i == z) for z in zeros)] for i, x in enumerate(tokens)]


def _weighted_mean(units, group, mass):
    """sum_i m_i u_i / sum_i m_i over a group, and the sum of its masses."""
    weights = [mass[i] for i in sorted(group)]
    total = math.fsum(weights)
    columns = zip(*(units[i] for i in sorted(group)), strict=True)
    return [_dot(weights, column) / total for column in columns], total


def weighted_distance(units, a, c, mass, method, metric="cosine"):
    """sum m_i m_j d_ij / (W_A W_C); ward: sqrt(2 W_A W_C/(W_A+W_C)) |mu-mu|.

    d_ij is 1 - cos_ij, or |x_i - x_j| for "euclidean".
    """
    (mean_a, w_a), (mean_c, w_c) = (_weighted_mean(units, g, mass) for g in (a, c))
    if method == "ward":
        # The factor 2 makes two tokens of mass 1 have the distance sqrt(2 - 2 cos),
        # as in the unweighted linkage.
        return math.sqrt(2 * w_a * w_c / (w_a + w_c)) * math.dist(mean_a, mean_c)
    between = []
    for i in a:
        for j in c:
            gap = math.dist(units[i], units[j])
            gap = gap if metric == "euclidean" else gap**2 / 2  # 1 - cos of units
            between.append(mass[i] * mass[j] * gap)
    return math.fsum(between) / (w_a * w_c)


def weighted_agglomerate(tokens, method, mass, metric="cosine"):
    """[(A, B, d(A, B)), ...]: the cheapest of all pairs each time.

    Distances come from the members of the clusters, never from earlier distances.
    """
    units = orthogonal_units(tokens) if metric == "cosine" else _rows(tokens)
    mass = floored(mass)
    clusters = [frozenset([i]) for i in range(len(units))]
    distance, merges = {}, []
    while len(clusters) > 1:
        for i, a in enumerate(clusters):
            for b in clusters[i + 1 :]:
                pair = frozenset([a, b])
                # A cluster never changes, so its distances stay valid.
                if pair not in distance:
                    distance[pair] = weighted_distance(
                        units, a, b, mass, method, metric
                    )
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


def bipartite(tokens, num_groups, metric="cosine", step=math.inf):
    """ToMe until K: each time the r best even groups join their best odd group.

    r = min(n - K, n // 2, step) of n groups, so the number of groups at most halves.
    """
    units = [_unit(x) if metric == "cosine" else x for x in _rows(tokens)]
    groups = [[i] for i in range(len(units))]
    while len(groups) > num_groups:
        vectors = [_mean([units[i] for i in group]) for group in groups]  # (n, D)
        r = min(len(groups) - num_groups, len(groups) // 2, step)
        targets = _bipartite_step(vectors, r, metric)
        # `merged` is a copy: a target of this step must not change before all have
        # joined.
        merged = [list(group) for group in groups]
        for source, target in targets.items():
            merged[target].extend(groups[source])
        groups = _causal(g for index, g in enumerate(merged) if index not in targets)
    return _causal(groups)


def _bipartite_step(vectors, r, metric):
    """Return {even index: odd index} of the r even ones with the largest max_B cos.

    For "euclidean" it is the largest -|x - y|^2 instead.
    """
    odd = list(range(1, len(vectors), 2))
    matches = []
    for index in range(0, len(vectors), 2):
        row = [_similarity(vectors[index], vectors[other], metric) for other in odd]
        best = _argmax(row)
        # Negated, so that an ascending sort starts with the most similar; equal
        # ones stay in the order of their indices.
        matches.append((-row[best], index, odd[best]))
    return {index: target for _, index, target in sorted(matches)[:r]}


def _similarity(x, y, metric):
    """cos, or -|x - y|^2."""
    return _cosine(x, y) if metric == "cosine" else -(math.dist(x, y) ** 2)


def contiguous(tokens, num_groups, protected=(), metric="cosine"):
    """Merge the neighbours of least ward cost (ties: the leftmost) until K groups.

    Protected tokens stay alone.
    """
    units = [_unit(x) if metric == "cosine" else x for x in _rows(tokens)]
    groups = [[i] for i in range(len(units))]
    while len(groups) > num_groups:
        members = [[units[i] for i in group] for group in groups]
        pairs = zip(members, members[1:], strict=False)
        costs = [_ward_cost(a, b, metric) for a, b in pairs]
        for left in range(len(costs)):
            # A protected token is always a group of one, so it is the first of its
            # group.
            if {groups[left][0], groups[left + 1][0]} & set(protected):
                costs[left] = math.inf
        left = costs.index(min(costs))
        groups[left : left + 2] = [groups[left] + groups[left + 1]]
    return groups


def _ward_cost(a, b, metric):
    """n_a n_b/(n_a+n_b) (q_a/n_a^2 + q_b/n_b^2 - 2 S_a.S_b/(n_a n_b)), S = sum u.

    This is n_a n_b/(n_a+n_b) times the squared distance of the two means, with q = S.S.
    """
    n_a, n_b = len(a), len(b)
    sum_a = [math.fsum(column) for column in zip(*a, strict=True)]
    sum_b = [math.fsum(column) for column in zip(*b, strict=True)]
    # A zero token is a unit vector of its own axis: it adds 1 to q, 0 to S_a.S_b.
    q_a, q_b = _dot(sum_a, sum_a), _dot(sum_b, sum_b)
    if metric == "cosine":
        q_a += sum(not any(u) for u in a)
        q_b += sum(not any(u) for u in b)
    apart = q_a / n_a**2 + q_b / n_b**2 - 2 * _dot(sum_a, sum_b) / (n_a * n_b)
    return n_a * n_b / (n_a + n_b) * apart


def nearest(tokens, anchors, metric="cosine"):
    """Each token joins argmax_anchor cos (ties: the lower); anchors stay their own.

    For "euclidean" it is the largest -|x - y|^2 instead.
    """
    tokens = _rows(tokens)
    # Ascending, so that the lower anchor wins a tie.
    anchors = sorted(int(anchor) for anchor in anchors)
    groups = {anchor: [anchor] for anchor in anchors}
    for i, x in enumerate(tokens):
        if i not in groups:
            best = _argmax([_similarity(x, tokens[a], metric) for a in anchors])
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
        # The library pads with such groups if K differs between sequences.
        if len(group) == 0:
            merged.append([0.0 for _ in tokens[0]])
            continue
        weights = [float(mass[j]) for j in group]
        if math.fsum(weights) == 0:  # otherwise 0 / 0
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
    if steps == 0:  # one token has no successor to predict
        return 0.0, 0.0, 0.0
    forward_errors, backward_errors = [], []
    for t in range(steps):
        guess = forward(np.array(_mean(merged[: t + 1])))
        forward_errors.append(_mean_squared_error(guess, merged[t + 1]))
    # The mirror image: the mean of the tokens from t on predicts the token before
    # t.
    for t in range(steps, 0, -1):
        guess = backward(np.array(_mean(merged[t:])))
        backward_errors.append(_mean_squared_error(guess, merged[t - 1]))
    forward_loss, backward_loss = (
        math.fsum(forward_errors) / steps,
        math.fsum(backward_errors) / steps,
    )
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


# ---------------------------------------------------------------- transformer prior


def transformer(tokens, weights, num_heads, reverse, positions, sizes):
    """Return the predictions of a pre-norm transformer, one token and head at a time.

    `reverse` makes it read the later tokens instead of the earlier ones.
    """
    parameters = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    order = range(len(tokens))

    def linear(name, x):
        return parameters[f"{name}.weight"] @ x + parameters[f"{name}.bias"]

    def norm(name, x):
        # A norm without a bias is an RMS norm; with one it is a layer norm.
        if f"{name}.bias" not in parameters:
            return x / math.sqrt((x * x).mean() + 1e-5) * parameters[f"{name}.weight"]
        centred = x - x.mean()
        scale = math.sqrt((centred * centred).mean() + 1e-5)
        return (
            centred / scale * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]
        )

    def gelu(x):
        # The exact form of GELU, with erf.
        return np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])

    def rotated(x, position):
        # Learned positions are added to the embedding, so the queries and keys stay
        # as they are.
        if "positions.weight" in parameters:
            return x
        # Rotary positions: the pair (x_i, x_{i+d/2}) turns by position *
        # 10000^(-2i/d).
        half, y = len(x) // 2, x.copy()
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / len(x))
            turn = complex(math.cos(angle), math.sin(angle))
            pair = complex(x[i], x[i + half]) * turn
            y[i], y[i + half] = pair.real, pair.imag
        return y

    x = [linear("embed", np.asarray(t, np.float64)) for t in tokens]  # (K, hidden)
    if "positions.weight" in parameters:
        x = [
            row + parameters["positions.weight"][positions[t]]
            for t, row in enumerate(x)
        ]
    block = 0
    while f"blocks.{block}.qkv.weight" in parameters:
        name = f"blocks.{block}"
        parts = [  # queries, keys and values of each token
            np.split(linear(f"{name}.qkv", norm(f"{name}.norm1", row)), 3) for row in x
        ]
        heads = [[np.split(part, num_heads) for part in row] for row in parts]
        read = []
        for t in order:
            # Size 0 marks padding, which no token reads.
            seen = [j for j in order if (j >= t if reverse else j <= t) and sizes[j]]
            out = []
            for h in range(num_heads):
                q = rotated(heads[t][0][h], positions[t])
                scores = [
                    # A merged token of n members counts as n equal tokens:
                    # e^(s + log n) = n e^s.
                    q @ rotated(heads[j][1][h], positions[j]) / math.sqrt(len(q))
                    + math.log(sizes[j])
                    for j in seen
                ]
                p = [math.exp(score - max(scores)) for score in scores]
                total = sum(v * heads[j][2][h] for v, j in zip(p, seen, strict=True))
                # A token that sees no other, because all are padding, reads zeros.
                out.append(total / sum(p) if seen else np.zeros(len(q)))
            read.append(np.concatenate(out))
        # A residual connection each for attention and for the MLP below.
        x = [row + linear(f"{name}.out", y) for row, y in zip(x, read, strict=True)]
        for t, row in enumerate(x):
            hidden = gelu(linear(f"{name}.mlp_in", norm(f"{name}.norm2", row)))
            x[t] = row + linear(f"{name}.mlp_out", hidden)
        block += 1
    return np.array([linear("head", norm("norm", row)) for row in x])


# ---------------------------------------------------------------- fidelity


def reconstruction_error(tokens, merged, labels=None):
    """||X - Xhat||^2 / ||X||^2, xhat_i = merged[label_i], or of greatest cosine.

    Label -1 leaves a token out. An exact reconstruction has error 0, also of zeros.
    """
    tokens, merged = _rows(tokens), _rows(merged)
    lost, total = [], []
    for i, x in enumerate(tokens):
        if labels is None:
            label = _argmax([_cosine(x, y) for y in merged])
        else:
            label = int(labels[i])
        if label < 0:
            continue
        lost.extend((a - b) ** 2 for a, b in zip(x, merged[label], strict=True))
        total.extend(a**2 for a in x)
    error, size = math.fsum(lost), math.fsum(total)
    # Zero tokens that are rebuilt as something else have an infinite relative
    # error.
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


def fidelity_loss(tokens_batch, merged_batch, gamma):
    """mean_b max(0, error_b - (1 - gamma)^2), error without labels."""
    losses = []
    for tokens, merged in zip(tokens_batch, merged_batch, strict=True):
        error = reconstruction_error(tokens, merged)
        # Only an error above the bound (1 - gamma)^2 adds to the loss.
        losses.append(max(0.0, error - (1 - gamma) ** 2))
    return math.fsum(losses) / len(losses)
