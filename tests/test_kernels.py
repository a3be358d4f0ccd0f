"""Every kernel, interpreted, against its formula in float64, at awkward sizes.

The public functions are called, on NumPy arrays that pass for CUDA's, so that every
launcher runs too.
"""

import ml_dtypes
import numpy as np
import oracle
import ptx
import pytest
from conftest import TF32_TOLERANCE, assert_close
from kernel_cases import dtypes, mask_of, masked, optimized, random
from seam import cuda

import qm_cupy as qm
from qm_cupy.priors import attention
from qm_cupy.stages.selection.gumbel_softmax import softmax_mass_cuda
from qm_cupy.stages.selection.perturbed_scores import perturbed_scores_cuda
from qm_cupy.stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = [1, 31, 32, 33, 127, 128, 129, 257]

sizes = pytest.mark.parametrize("num_tokens", SIZES)


def valid_of(mask, shape):
    return np.ones(shape, np.bool_) if mask is None else np.broadcast_to(mask, shape)


def labels_of(batch, num_tokens, num_groups, seed=3):
    """Random labels with some padding and, if there is room, an empty group."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(num_groups - 1, 1), size=(batch, num_tokens))
    labels[rng.random((batch, num_tokens)) < 0.1] = -1
    return labels


def entropy_of(scores, allowed):
    """Entropy of the softmax of each row over the allowed columns, centred, float64."""
    scores = np.where(allowed, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e300)
    shifted = np.where(allowed, scores - top, 0)
    e = np.where(allowed, np.exp(shifted), 0)
    total = e.sum(-1)
    dominant = np.argmax(scores, axis=-1)[..., None]
    others = e.copy()
    np.put_along_axis(others, dominant, 0, axis=-1)
    rest = others.sum(-1)
    value = np.log1p(rest) - (others * shifted).sum(-1) / np.maximum(total, 1)
    return np.where(allowed.any(-1), value, 0)


def allowed_of(mask, num_tokens, causal=False):
    allowed = np.ones((1, num_tokens, num_tokens), dtype=bool)
    if causal:
        allowed = np.tril(allowed)
    if mask is not None:
        allowed = allowed & mask[:, None, :] & mask[:, :, None]
    return allowed


@dtypes
@sizes
@masked
def test_attention_entropy(dtype, num_tokens, masked):
    layers, batch, heads = 2, 3, 2
    mask = mask_of(batch, num_tokens, masked)
    shape = (layers, batch, heads, num_tokens, num_tokens)
    a = np.exp(random(shape, np.float64, scale=2))
    a[..., ::3] = 0
    a[0, ..., -1, :] = 0  # a row without attention
    a[1] = (a / np.maximum(a.sum(-1, keepdims=True), 1e-9))[1]  # the others' sum is any
    a = a.astype(dtype)
    got = qm.attention_entropy(a, mask=mask)
    a = np.where(allowed_of(mask, num_tokens)[:, None], a.astype(np.float64), 0)
    p = a / np.maximum(a.sum(-1, keepdims=True), 1e-300)
    wanted = np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    assert_close(got, wanted, dtype)
    assert got.min() >= 0


@dtypes
@sizes
@masked
def test_query_key_entropy(dtype, num_tokens, masked):
    layers, batch, heads = 1, 2, 2
    widths = {1: 1, 31: 17, 32: 64, 33: 100, 127: 80, 128: 128, 129: 33, 257: 72}
    shape = (layers, batch, heads, num_tokens, widths[num_tokens])
    mask = mask_of(batch, num_tokens, masked)
    query, key = random(shape, dtype, 1, 2), random(shape, dtype, 2, 2)
    scores = query.astype(np.float64) @ np.swapaxes(key.astype(np.float64), -1, -2)
    for causal in (False, True):
        got = qm.query_key_entropy(query, key, causal=causal, mask=mask)
        allowed = allowed_of(mask, num_tokens, causal)[:, None]
        allowed = np.broadcast_to(allowed, scores.shape)
        wanted = entropy_of(scores * shape[-1] ** -0.5, allowed)
        assert_close(got, wanted, dtype)


@dtypes
def test_query_key_entropy_takes_the_mask_of_its_sequence(dtype):
    """Of layers, sequences and heads there are different numbers."""
    query, key = (random((2, 3, 5, 33, 8), dtype, seed) for seed in (1, 2))
    mask = mask_of(4, 33)[:3]
    got = qm.query_key_entropy(query, key, mask=mask)
    for b in range(3):
        one = qm.query_key_entropy(query[:, [b]], key[:, [b]], mask=mask[[b]])
        np.testing.assert_array_equal(got[:, [b]], one)


@dtypes
@pytest.mark.parametrize("head_dim", [192, 255, 256])
def test_query_key_entropy_of_wide_heads(dtype, head_dim):
    query, key = (random((70, head_dim), dtype, seed) for seed in (1, 2))
    got = qm.query_key_entropy(query, key, causal=True, scale=0.3)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    assert_close(got, entropy_of(scores * 0.3, allowed_of(None, 70, True)[0]), dtype)


@dtypes
@sizes
@masked
def test_self_attention_entropy(dtype, num_tokens, masked):
    batch, dim = 2, (32, 37, 40)[num_tokens % 3]  # whole steps, odd, in 16 bytes
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    got = qm.self_attention_entropy(tokens, mask=mask)
    x = tokens.astype(np.float64)
    scores = x @ np.swapaxes(x, -1, -2) / np.sqrt(dim)
    allowed = np.broadcast_to(allowed_of(mask, num_tokens), scores.shape)
    assert_close(got, entropy_of(scores, allowed), dtype)


@dtypes
def test_self_attention_entropy_where_one_score_dominates(dtype):
    tokens = random((1, 1, 129, 1024), dtype)  # a layer of one sequence
    got = qm.self_attention_entropy(tokens)
    x = tokens.astype(np.float64)
    scores = x @ np.swapaxes(x, -1, -2) / 32
    wanted = entropy_of(scores, np.ones(scores.shape, dtype=bool))
    assert wanted.max() < 1e-7
    tolerance = 1e-9 if dtype == np.float64 else 2e-4
    np.testing.assert_allclose(got, wanted, rtol=tolerance)


@dtypes
@pytest.mark.parametrize("scale", [1e-25, 0.3, 1e3, 1e6])
def test_entropy_of_equal_scores(dtype, scale):
    """A score as large as the largest counts as much, however large they are."""
    token = random((1, 40), dtype) + np.ones(1, dtype)
    query = np.repeat(token, 129, axis=0)
    mask = np.arange(129) >= 2
    wanted = np.where(mask, np.log(mask.sum()), 0)
    got = qm.query_key_entropy(query, query, scale=scale, mask=mask)
    assert_close(got, wanted, dtype)
    got = qm.query_key_entropy(query, query, scale=scale, causal=True)
    assert_close(got, np.log(np.arange(129) + 1), dtype)
    assert_close(qm.self_attention_entropy(query, mask=mask), wanted, dtype)


@dtypes
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_entropies_of_what_is_no_number_are_none(dtype, wrong):
    """A kernel does not look for NaN, and never hides it."""
    query, key = (random((130, 24), dtype, seed) for seed in (1, 2))
    key[70, 3] = wrong
    got = qm.query_key_entropy(query, key, causal=True)
    assert np.isfinite(got[:70]).all()
    assert np.isnan(got[70:]).all()
    assert np.isnan(qm.self_attention_entropy(key)).all()
    got = qm.query_key_entropy(query, key, mask=np.arange(130) != 70)
    assert np.isfinite(got).all()  # what lies under padding does not count


def saliency_of(entropy, valid, salient):
    """Return saliency (B, N) of entropy (L, B, H, N) and tokens (B, N)."""
    h = entropy.astype(np.float64).mean(2)
    low = np.where(valid, h, np.inf).min(-1, keepdims=True)
    width = np.where(valid, h, -np.inf).max(-1, keepdims=True) - low
    low, width = np.where(width > 0, low, 0), np.where(width > 0, width, np.inf)
    mean = ((h - low) / width).mean(0)
    return np.where(valid, mean if salient == "high" else 1 - mean, 0)


@dtypes
@sizes
@masked
def test_saliency(dtype, num_tokens, masked):
    layers, batch, heads = 3, 2, 2
    mask = mask_of(batch, num_tokens, masked)
    entropy = abs(random((layers, batch, heads, num_tokens), dtype))
    entropy[1] = 2  # a constant layer normalises to 0
    valid = valid_of(mask, (batch, num_tokens))
    for salient in ("low", "high"):
        got = qm.saliency(entropy, salient=salient, mask=mask)
        assert_close(got, saliency_of(entropy, valid, salient), dtype)


@dtypes
@sizes
@masked
def test_norm_saliency(dtype, num_tokens, masked):
    batch, dim = 2, 37
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    valid = valid_of(mask, (batch, num_tokens))
    tokens[~valid] = np.nan  # is not read
    x = np.where(valid[..., None], tokens.astype(np.float64), 0)
    norms = np.linalg.norm(x, axis=-1)
    wanted = saliency_of(norms[None, :, None], valid, "high")
    assert_close(qm.norm_saliency(tokens, mask=mask), wanted, dtype)


def noise_of(valid, seed, first=0):
    """Return the noise of each token: draw n for the n-th, whatever lies between."""
    out = np.zeros(valid.shape)
    for b, row in enumerate(valid):
        out[b, row] = oracle.gumbel_noise(row.sum(), seed, first + b)
    return out


def softmax_of(z, valid, temperature):
    top = np.where(valid, z, -1e30).max(-1, keepdims=True)
    e = np.where(valid, np.exp(np.where(valid, z - top, 0) / temperature), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


@dtypes
@sizes
@masked
@pytest.mark.parametrize("seed", [None, 7])
def test_gumbel_softmax_and_mass(dtype, num_tokens, masked, seed, kernels):
    batch, first = 3, 2**32 - 2  # the third sequence's number takes 33 bits
    mask = mask_of(batch, num_tokens, masked)
    s = abs(random((batch, num_tokens), dtype))
    valid = valid_of(mask, s.shape)
    options = {"seed": seed, "mask": mask, "sequence_offset": first}
    got = qm.gumbel_softmax(s, temperature=0.1, **options)
    z = s.astype(np.float64)
    if seed is not None:
        noise = [noise_of(valid[b : b + 1], seed, first + b) for b in range(batch)]
        z = z + np.concatenate(noise)
    wanted = softmax_of(z, valid, 0.1)
    assert_close(got, wanted, dtype)
    mass = qm.saliency_mass(s.astype(got.dtype), got, epsilon=0.01)
    p = got.astype(np.float64)
    assert_close(mass, p * s.astype(np.float64) + (1 - p) * 0.01, dtype)
    if kernels == "optimized":
        again, fused = softmax_mass_cuda(s, 0.1, (seed, first), 0.01, mask)
        np.testing.assert_array_equal(again, got)
        np.testing.assert_allclose(fused, np.where(valid, mass, 0), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**64 - 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_has_the_same_bits(seed, dtype):
    """Saliency 0 leaves nothing but the noise in the scores."""
    for first in (5, 2**32 - 2):  # of three sequences, the last takes 33 bits
        zeros = np.zeros((3, 33), dtype)
        got = perturbed_scores_cuda(zeros, (seed, first), None)
        wanted = qm.gumbel_noise((3, 33), seed, sequence_offset=first)
        np.testing.assert_array_equal(got, wanted)


@dtypes
@pytest.mark.parametrize("num_tokens", [*SIZES, 1000])
@optimized
def test_perturbed_scores_have_the_bits_of_the_basic_kernel(dtype, num_tokens):
    saliency, mask = random((3, num_tokens), dtype), mask_of(3, num_tokens)
    got = perturbed_scores_cuda(saliency, (7, 5), mask)
    with qm.use_kernels("basic"):
        wanted = perturbed_scores_cuda(saliency, (7, 5), mask)
    np.testing.assert_array_equal(got, wanted)


@dtypes
def test_padding_draws_no_noise(dtype):
    """A sequence padded on the left, or anywhere, is the sequence alone."""
    alone = abs(random((2, 300), dtype))
    places = np.sort(np.random.default_rng(1).permutation(700)[:300])
    for place in (np.arange(300) + 400, places):
        padded, mask = np.full((2, 700), 9, dtype), np.zeros((2, 700), np.bool_)
        padded[:, place], mask[:, place] = alone, True
        for options in ({"temperature": 0.5}, {"hard": np.array([7, 299])}):
            wanted = qm.gumbel_softmax(alone, seed=3, **options)
            got = qm.gumbel_softmax(padded, seed=3, mask=mask, **options)
            tolerance = 1e-5 if dtype != np.float64 else 1e-13  # another order of sums
            np.testing.assert_allclose(got[:, place], wanted, rtol=tolerance)
            assert not got[~mask].any()


@dtypes
@pytest.mark.parametrize("temperature", [1e-46, 1e-320, 1e-8, 1e30, 1e300])
def test_extreme_temperatures(dtype, temperature):
    s = np.array([[0.5, 0.25, 0.75, 0.125]], dtype)
    got = qm.gumbel_softmax(s, temperature=temperature, seed=None)
    one_hot, uniform = [[0, 0, 1, 0]], [[0.25] * 4]
    assert_close(got, one_hot if temperature < 1 else uniform, dtype)


def kept_of(scores, valid, count):
    order = np.argsort(-scores[valid].astype(np.float64), kind="stable")
    return np.sort(np.flatnonzero(valid)[order[:count]])


@dtypes
@pytest.mark.parametrize("num_tokens", [*SIZES, 1000])
@masked
def test_select_tokens(dtype, num_tokens, masked):
    batch, num_groups = 3, max(num_tokens // 3, 1)
    mask = mask_of(batch, num_tokens, masked)
    scores = random((batch, num_tokens), np.float32, scale=2)
    scores = np.copysign(np.round(scores), scores).astype(dtype)  # ties; -0 equals 0
    scores[0, ::5] = -60000  # far below, but no padding
    each = np.array([num_groups, max(num_groups // 2, 1), 1])
    for counts in (num_groups, each):
        got = qm.select_tokens(scores, counts, mask=mask)
        hot = qm.gumbel_softmax(scores, seed=None, hard=counts, mask=mask)
        for b in range(batch):
            valid = valid_of(mask, scores.shape)[b]
            count = np.broadcast_to(counts, batch)[b]
            wanted = np.full(num_groups, -1)
            kept = kept_of(scores[b], valid, count)
            wanted[: len(kept)] = kept
            np.testing.assert_array_equal(got[b], wanted)
            np.testing.assert_array_equal(np.flatnonzero(hot[b]), kept)


@dtypes
def test_select_tokens_orders_subnormal_scores(dtype):
    """As NumPy does, though arithmetic in float32 counts all of them as 0 on a GPU."""
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    scores = np.random.default_rng(8).integers(-60, 61, (2, 300)) * tiny
    scores[1, :150] = np.copysign(0, scores[1, :150])  # -0 and 0 are equal
    scores = scores.astype(dtype)
    for count in (1, 40, 170, 299):
        got = qm.select_tokens(scores, count)
        hot = qm.gumbel_softmax(scores, seed=None, hard=count)
        for b in range(2):
            kept = kept_of(scores[b], np.ones(300, np.bool_), count)
            np.testing.assert_array_equal(got[b], kept)
            np.testing.assert_array_equal(np.flatnonzero(hot[b]), kept)


def select_of_optimized(scores, counts, num_groups):
    """Launch both kernels of the selection and return the K-hot mask and positions."""
    batch, num_tokens = scores.shape
    chosen = ptx.empty(scores.shape, np.bool_)
    args = (scores, counts, batch, num_tokens, num_groups, chosen)
    work = {"blocks": batch, "kernels": "optimized"}
    cuda.launch("select_tokens", "top_tokens", scores.dtype, args, **work)
    positions = ptx.empty((batch, num_groups), np.int32)
    args = (chosen, batch, num_tokens, num_groups, positions)
    cuda.launch("select_tokens", "select_tokens", np.float32, args, **work)
    return chosen, positions


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@optimized
def test_radix_selection(dtype):
    """The K-th score is found whatever the scores: bits, ties, infinities, padding."""
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**64, 20_000, dtype=np.uint64).view(dtype)[:20_000]
    tiny = np.finfo(dtype).smallest_subnormal
    rows = [
        np.where(np.isfinite(words), words, 0),
        rng.integers(-2, 3, 20_000) * tiny,
        np.full(20_000, 0.25, dtype),
    ]
    rows.append(np.where(rng.random(20_000) < 0.5, -np.inf, rng.random(20_000)))
    scores = np.stack(rows).astype(dtype)
    valid = np.isfinite(scores)
    for counts in ([1, 255, 16_384, 20_000], [4096, 20_000, 1, 257]):
        given = np.array(counts, np.int32)
        chosen, positions = select_of_optimized(scores, given, max(counts))
        for b, count in enumerate(counts):
            kept = kept_of(scores[b], valid[b], count)
            np.testing.assert_array_equal(np.flatnonzero(chosen[b]), kept)
            np.testing.assert_array_equal(positions[b, : len(kept)], kept)
            assert (positions[b, len(kept) :] == -1).all()


@dtypes
@sizes
@masked
@optimized
def test_saliency_gumbel_mass_in_one_launch(dtype, num_tokens, masked):
    layers, batch, heads = 3, 3, 2
    mask = mask_of(batch, num_tokens, masked)
    entropy = abs(random((layers, batch, heads, num_tokens), dtype))
    entropy[1] = 2
    valid = valid_of(mask, (batch, num_tokens))
    for seed, salient in ((None, "low"), (11, "high")):
        options = 0.1, (seed, 4), 0.01, mask
        got = saliency_gumbel_mass_cuda(entropy, salient, *options)
        s = qm.saliency(entropy, salient=salient, mask=mask)
        np.testing.assert_allclose(got[0], s, rtol=1e-6, atol=1e-6)
        drawn = {"seed": seed, "sequence_offset": 4, "mask": mask}
        p = qm.gumbel_softmax(s, temperature=0.1, **drawn)
        assert_close(got[1], p, dtype)
        m = qm.saliency_mass(s, p, epsilon=0.01)
        assert_close(got[2], np.where(valid, m, 0), dtype)


def merged_of(tokens, labels, num_groups, mass):
    batch, _, dim = tokens.shape
    out = np.zeros((batch, num_groups, dim))
    for b, k in np.ndindex(batch, num_groups):
        x = tokens[b, labels[b] == k].astype(np.float64)
        w = np.ones(len(x)) if mass is None else mass[b, labels[b] == k].astype(float)
        if len(x):
            out[b, k] = np.average(x, axis=0, weights=w if w.sum() else None)
    return out


@dtypes
@sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_merge_and_unmerge_tokens(dtype, num_tokens, weighted):
    batch, num_groups = 2, max(num_tokens // 4, 1)
    for dim in (1, 7, 32, 130):
        tokens = random((batch, num_tokens, dim), dtype)
        labels = labels_of(batch, num_tokens, num_groups)
        mass = None
        if weighted:
            mass = abs(random((batch, num_tokens), cuda.accumulation_dtype(dtype)))
            mass[labels == 1] = 0  # this group takes the plain mean
        got = qm.merge_tokens(tokens, labels, num_groups, mass=mass)
        assert got.dtype == dtype
        assert_close(got, merged_of(tokens, labels, num_groups, mass), dtype, "stored")
        out = ptx.empty(got.shape, dtype)
        again = qm.merge_tokens(tokens, labels, num_groups, mass=mass, out=out)
        assert again is out
        np.testing.assert_array_equal(got, out)
        back = qm.unmerge_tokens(got, labels)
        group = got[np.arange(batch)[:, None], labels]
        wanted = np.where((labels >= 0)[..., None], group, 0).astype(dtype)
        np.testing.assert_array_equal(back, wanted)


@sizes
def test_group_sizes_and_positions(num_tokens):
    batch, num_groups = 3, max(num_tokens // 4, 1)
    labels = labels_of(batch, num_tokens, num_groups)
    member = labels[:, :, None] == np.arange(num_groups)
    np.testing.assert_array_equal(qm.group_sizes(labels, num_groups), member.sum(1))
    last = np.where(member, np.arange(num_tokens)[:, None], -1).max(1)
    np.testing.assert_array_equal(qm.group_positions(labels, num_groups), last)


@dtypes
def test_wild_labels_count_as_padding(dtype):
    """Nobody looks at labels on a GPU; the interpreter looks at the kernels."""
    num_groups = 5
    tokens, merged = random((2, 70, 9), dtype), random((2, num_groups, 9), dtype, 1)
    tame = labels_of(2, 70, num_groups).astype(np.int32)
    tame[:, 60:] = -1
    wild = tame.copy()
    wild[:, 60:] = np.array([5, 6, -2, 1000, -1000, 2**31 - 1, -(2**31), 70, 99, 5])
    for measure in (
        lambda labels: qm.merge_tokens(tokens, labels, num_groups),
        lambda labels: qm.unmerge_tokens(merged, labels),
        lambda labels: qm.group_sizes(labels, num_groups),
        lambda labels: qm.group_positions(labels, num_groups),
        lambda labels: qm.reconstruction_error(tokens, merged, labels=labels),
    ):
        np.testing.assert_array_equal(measure(wild), measure(tame))


@dtypes
def test_wild_counts_stay_within_their_arrays(dtype, monkeypatch):
    merged, tokens = random((2, 6, 9), dtype), random((2, 40, 9), dtype, 1)
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    wild, tame = np.array([-3, 1000], np.int32), np.array([0, 6], np.int32)
    found = []
    for counts in (wild, tame):
        monkeypatch.setattr(cuda, "device_counts", lambda _, counts=counts: (counts, 6))
        error = qm.reconstruction_error(tokens, merged)
        found.append([*qm.alignment_loss(merged, prior), error])
        if counts is tame:
            monkeypatch.setattr(cuda, "device_counts", lambda _: (tame, 40))
        found[-1].append(qm.select_tokens(tokens[..., 0], 6))
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(got, wanted)


@dtypes
@pytest.mark.parametrize("num_groups", [1, 2, 33, 129])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_alignment(dtype, num_groups, ragged):
    batch, dim = 3, 37
    merged = random((batch, num_groups, dim), dtype)
    counts = np.array([num_groups, max(num_groups // 2, 1), 1])
    if not ragged:
        counts[:] = num_groups
    prior = qm.MLPPrior.init(dim, hidden_dim=50)
    valid = counts if ragged else None
    losses = qm.alignment_loss(merged, prior, num_groups=valid)
    for reverse, mlp in enumerate((prior.forward, prior.backward)):
        predicted = prior.predict(merged, reverse=bool(reverse), num_groups=valid)
        weights = [w.astype(np.float64) for w in mlp]
        for b, count in enumerate(counts):
            x = merged[b, :count].astype(np.float64)
            order = slice(None, None, -1 if reverse else 1)
            means = np.cumsum(x[order], axis=0) / np.arange(1, count + 1)[:, None]
            hidden = np.maximum(means[order] @ weights[0].T + weights[1], 0)
            y = hidden @ weights[2].T + weights[3]  # (K, D), each token at its own row
            assert_close(predicted[b, :count], y, dtype)
            error = y[1:] - x[:-1] if reverse else y[:-1] - x[1:]
            wanted = np.mean(error**2) if count > 1 else 0
            assert_close(losses[reverse][b], wanted, dtype)
    np.testing.assert_array_equal(losses.total, losses.forward + losses.backward)


@dtypes
def test_predictions_from_what_is_not_a_number(dtype):
    """Inputs are not checked on a GPU: what has read a NaN is NaN, and nothing else."""
    merged = random((2, 6, 9), dtype)
    merged[0, 2, 4] = np.nan
    got = qm.MLPPrior.init(9, hidden_dim=5).predict(merged)
    assert np.isnan(got[0, 2:]).all()
    assert np.isfinite(got[0, :2]).all()
    assert np.isfinite(got[1]).all()


def test_weights_of_a_prior_are_uploaded_once(monkeypatch):
    uploads, to_device = [], cuda.to_device

    def counted(x):
        uploads.append(x)
        return to_device(x)

    monkeypatch.setattr(cuda, "to_device", counted)
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    prior.predict(random((2, 6, 9), np.float32))
    assert len(uploads) == 4  # of the one network that was asked
    first = qm.alignment_loss(random((2, 6, 9), np.float32), prior)
    assert len(uploads) == 8
    for dtype in (np.float32, np.float16):  # both compute in float32
        again = qm.alignment_loss(random((2, 6, 9), dtype), prior)
    assert len(uploads) == 8
    assert_close(again.total, first.total, np.float16, "stored")
    qm.alignment_loss(random((2, 6, 9), np.float64), prior)
    assert len(uploads) == 16


@dtypes
@sizes
@masked
def test_norm_mass(dtype, num_tokens, masked):
    batch, dim, num_groups = 3, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[2] = 0
    each = np.array([num_groups, 1, num_groups])
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    norms = np.where(valid_of(mask, norms.shape), norms, 0)
    for counts in (num_groups, each):
        got = qm.norm_mass(tokens, counts, mask=mask)
        largest = -np.sort(-norms, axis=-1)
        kept = np.where(np.arange(num_tokens) < np.reshape(counts, (-1, 1)), largest, 0)
        total = norms.sum(-1)
        wanted = np.where(total > 0, kept.sum(-1) / np.where(total > 0, total, 1), 1)
        assert_close(got, wanted, dtype)


def error_of(tokens, merged, labels):
    """Return the relative squared error of tokens rebuilt by labels, -1 left out."""
    x, y = tokens.astype(np.float64), merged.astype(np.float64)
    y = y[np.arange(len(x))[:, None], labels]
    valid = (labels >= 0)[..., None]
    squares = np.where(valid, x**2, 0).sum((1, 2))
    error = np.where(valid, (x - y) ** 2, 0).sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, error / squares, 0)


@dtypes
@sizes
@masked
def test_reconstruction_error(dtype, num_tokens, masked):
    batch, dim, num_groups = 3, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    merged = random((batch, num_groups, dim), dtype, 9)
    tokens[1] = 0
    merged[1, 1:] = 0  # of a sequence of zeros, group 0 is lost altogether
    labels = labels_of(batch, num_tokens, num_groups)
    valid = valid_of(mask, labels.shape)
    for lost in (True, False):
        labels[1] = 0 if lost else num_groups - 1
        got = qm.reconstruction_error(tokens, merged, labels=labels, mask=mask)
        wanted = error_of(tokens, merged, np.where(valid, labels, -1))
        assert_close(got, wanted, dtype)
    assert_close(
        qm.fidelity_loss(tokens[::2], merged[::2], labels=labels[::2], gamma=0.8),
        np.maximum(error_of(tokens[::2], merged[::2], labels[::2]) - 0.04, 0).mean(),
        dtype,
    )


def cosine_of(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    x = x / np.where(norm := np.linalg.norm(x, axis=-1, keepdims=True), norm, 1)
    y = y / np.where(norm := np.linalg.norm(y, axis=-1, keepdims=True), norm, 1)
    return x @ np.swapaxes(y, -1, -2)


@dtypes
@sizes
def test_cosine_similarity(dtype, num_tokens):
    tokens = random((2, num_tokens, 32 if num_tokens % 2 == 0 else 37), dtype)
    tokens[:, num_tokens // 2] = 0
    got = qm.cosine_similarity(tokens)
    assert_close(got, cosine_of(tokens, tokens), dtype)
    np.testing.assert_array_equal(got, np.swapaxes(got, 1, 2))


@dtypes
def test_cosine_similarity_of_what_is_not_a_number(dtype):
    """Which are not checked on a GPU: by its cosines linkage leaves the token alone."""
    tokens = random((2, 33, 9), dtype)
    tokens[0, 5] = np.nan
    bad = np.zeros((2, 33, 33), np.bool_)
    bad[0, 5] = bad[0, :, 5] = True
    np.testing.assert_array_equal(np.isnan(qm.cosine_similarity(tokens)), bad)


@dtypes
@sizes
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_most_similar_merged_token(dtype, num_tokens, ragged):
    """Without labels each token is rebuilt by the most similar; of equals the first."""
    tokens = random((2, num_tokens, 37), dtype)
    merged = tokens[:, :: max(num_tokens // 7, 1)].copy()
    merged = np.concatenate([merged, merged[:, :1]], axis=1)
    merged[:, -1] *= 2  # as similar as the first, but further off: never chosen
    most = merged.shape[1]
    counts = np.array([most, max(most // 2, 1)]) if ragged else np.array([most, most])
    got = qm.reconstruction_error(tokens, merged, num_groups=counts if ragged else None)
    similarity = cosine_of(tokens, merged)
    out_of = np.arange(most) >= counts[:, None]  # (B, K)
    similarity = np.where(out_of[:, None], -np.inf, similarity)
    similarity[..., -1] -= 1e-9
    assert_close(got, error_of(tokens, merged, similarity.argmax(-1)), dtype)


def shifted(x, elements):
    """Copy an array to so many elements behind 16 bytes, at the end of its memory."""
    raw = np.empty(elements + x.size, x.dtype)
    assert raw.ctypes.data % 16 == 0
    raw[elements:] = x.ravel()
    return raw[elements:].reshape(x.shape)


@dtypes
@pytest.mark.parametrize("dim", [20, 37, 50])
def test_results_do_not_depend_on_alignment(dtype, dim):
    """Whatever width loads and stores have, the sums are the same."""
    tokens, other = random((2, 33, dim), dtype), random((2, 5, dim), dtype, 1)
    attention = abs(random((1, 2, 1, dim, dim), dtype, 2))
    labels, mass = labels_of(2, 33, 5), abs(random((2, 33), np.float32, 3))

    def results(shift):
        x, y, a = (shifted(z, shift) for z in (tokens, other, attention))
        yield qm.cosine_similarity(x)
        yield qm.self_attention_entropy(x)
        yield qm.query_key_entropy(x[:, None], x[:, None])
        yield qm.attention_entropy(a)
        yield qm.attention_entropy_vjp(a[..., 0], a)
        yield qm.norm_saliency(x)
        yield qm.merge_tokens(x, labels, 5)
        yield qm.unmerge_tokens(y, labels)
        yield qm.unmerge_tokens_vjp(x, labels, 5)
        yield from qm.merge_tokens_vjp(y, x, labels, 5, mass=mass)
        yield qm.reconstruction_error(x, y)
        yield from qm.reconstruction_error_vjp(np.ones(2), x, y)

    wanted = list(results(0))
    for shift in (1, 2, 4):
        for x, z in zip(results(shift), wanted, strict=True):
            np.testing.assert_array_equal(x, z)


def truncated(x):
    """Drop the 13 bits of float32 that TF32 does not have."""
    return (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)


@sizes
@optimized
def test_entropies_with_tf32_are_those_of_truncated_tokens(num_tokens):
    mask = mask_of(2, num_tokens)
    tokens = random((2, num_tokens, 37), np.float32)

    def entropies(x):
        self_attention = qm.self_attention_entropy(x, mask=mask)
        return self_attention, qm.query_key_entropy(x, x, causal=True, mask=mask)

    plain, wanted = entropies(tokens), entropies(truncated(tokens))
    with qm.allow_tf32():
        got = entropies(tokens)
    for x, y, z in zip(got, wanted, plain, strict=True):
        assert_close(x, y, np.float32)
        assert (x != z).any() or num_tokens == 1  # entropy 0


def tf32_calls(num_tokens, dim):
    """Return a call for every operation whose products TF32 changes."""
    x = random((2, num_tokens, dim), np.float32)
    query, key = (
        random((2, num_tokens, dim), np.float32, seed, 1.5) for seed in (1, 2)
    )
    gradient, ones = random((2, num_tokens), np.float32, 3), np.ones(2, np.float32)
    mlp = qm.MLPPrior.init(dim, hidden_dim=50)
    transformer = qm.TransformerPrior.init(
        dim, hidden_dim=40, num_heads=2, num_layers=1, mlp_dim=70
    )

    def alignment_vjp():
        by_merged, weights = qm.alignment_loss_vjp((0 * ones, ones, ones), x, mlp)
        return by_merged, *weights[0], *weights[1]

    return {
        "cosine_similarity": lambda: [qm.cosine_similarity(x)],
        "query_key_entropy": lambda: [qm.query_key_entropy(query, key)],
        "self_attention_entropy": lambda: [qm.self_attention_entropy(x)],
        "alignment_loss": lambda: qm.alignment_loss(x, mlp),
        "MLPPrior.predict": lambda: [mlp.predict(x)],
        "TransformerPrior.predict": lambda: [transformer.predict(x)],
        "query_key_entropy_vjp": lambda: qm.query_key_entropy_vjp(gradient, query, key),
        "self_attention_entropy_vjp": lambda: [
            qm.self_attention_entropy_vjp(gradient, x)
        ],
        "alignment_loss_vjp": alignment_vjp,
    }


@pytest.mark.parametrize("name", TF32_TOLERANCE)
@optimized
def test_tf32_changes_results_no_more_than_it_may(name):
    for num_tokens, dim in ((33, 37), (65, 64)):
        call = tf32_calls(num_tokens, dim)[name]
        plain = call()
        with qm.allow_tf32():
            got = call()
        assert any((x != y).any() for x, y in zip(got, plain, strict=True))
        for x, y in zip(got, plain, strict=True):
            peak = abs(y).max()
            room = TF32_TOLERANCE[name] * (peak if "vjp" in name else max(peak, 1))
            np.testing.assert_allclose(x, y, rtol=0, atol=room)


@pytest.mark.parametrize("scale", [0.05, 1.0])
@optimized
def test_entropies_with_tf32_are_within_their_bound(scale):
    """The one that the docstring of allow_tf32 derives, whatever the scores."""
    query, key = (random((129, 64), np.float32, seed, 1.5) for seed in (1, 2))
    q, k = query.astype(np.float64), key.astype(np.float64)
    allowed = np.ones((129, 129), np.bool_)
    wanted = entropy_of(q @ k.T * scale, allowed)
    change = 2**-9 * scale * (abs(q) @ abs(k).T).max(-1)
    bound = change * np.sqrt(1 + np.log(129) ** 2 / 4) + 2e-5
    with qm.allow_tf32():
        got = qm.query_key_entropy(query, key, scale=scale)
    assert (abs(got - wanted) <= bound).all()


@optimized
def test_products_with_tf32_are_near_the_truth():
    tokens = random((2, 129, 37), np.float32)
    prior = qm.MLPPrior.init(37, hidden_dim=50)
    measures = qm.cosine_similarity, prior.predict
    for measure in measures:
        plain = measure(tokens)
        with qm.allow_tf32():
            got = measure(tokens)
        assert got.dtype == np.float32
        assert_close(got, plain, "tf32")
        assert (got != plain).any()
    with qm.allow_tf32():
        cosines = qm.cosine_similarity(tokens)
        np.testing.assert_array_equal(cosines, np.swapaxes(cosines, 1, 2))


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("basic", np.float32),
        ("optimized-75", np.float32),  # whose tensor cores know no TF32
        ("optimized", np.float16),
        ("optimized", np.float64),
    ],
    indirect=["kernels"],
)
def test_tf32_is_for_float32_on_tensor_cores_alone(dtype):
    tokens = random((1, 40, 16), dtype)
    plain = qm.self_attention_entropy(tokens)
    with qm.allow_tf32():
        np.testing.assert_array_equal(qm.self_attention_entropy(tokens), plain)


def test_public_functions_take_one_sequence():
    """Without the batch axis the same launchers run, and leave it out again."""
    tokens, scores = random((40, 9), np.float32), abs(random(40, np.float32))
    labels, mask = labels_of(1, 40, 5)[0], mask_of(3, 40)[0]
    attention = abs(random((40, 40), np.float32))
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    for measure, *arrays in (
        (lambda a, m: qm.attention_entropy(a, mask=m), attention, mask),
        (lambda q, m: qm.query_key_entropy(q, q, mask=m), tokens, mask),
        (lambda x, m: qm.self_attention_entropy(x, mask=m), tokens, mask),
        (lambda h, m: qm.saliency(h, mask=m), scores, mask),
        (lambda x, m: qm.norm_saliency(x, mask=m), tokens, mask),
        (lambda s, m: qm.gumbel_softmax(s, mask=m), scores, mask),
        (lambda s, m: qm.gumbel_softmax(s, hard=3, mask=m), scores, mask),
        (lambda s: qm.saliency_mass(s, s), scores),
        (lambda s, m: qm.select_tokens(s, 4, mask=m), scores, mask),
        (lambda x, g: qm.merge_tokens(x, g, 5), tokens, labels),
        (lambda x, g: qm.unmerge_tokens(x, g), tokens, labels),
        (lambda g: qm.group_sizes(g, 5), labels),
        (lambda g: qm.group_positions(g, 5), labels),
        (lambda x: qm.alignment_loss(x, prior).total, tokens),
        (lambda x, m: qm.norm_mass(x, 5, mask=m), tokens, mask),
        (lambda x, m: qm.reconstruction_error(x, x[..., :7, :], mask=m), tokens, mask),
        (lambda x: qm.cosine_similarity(x), tokens),
    ):
        one = measure(*arrays)
        many = measure(*(x[None] for x in arrays))
        np.testing.assert_array_equal(np.asarray(one)[None], many)


def test_views_are_read_as_they_are():
    """Launchers copy what is not C-contiguous; kernels know no strides."""
    wide = random((80, 2, 18), np.float16)
    tokens = wide.transpose(1, 0, 2)[:, ::2, ::2]  # (2, 40, 9)
    labels = labels_of(40, 2, 5).T
    for measure in (qm.norm_saliency, qm.self_attention_entropy, qm.cosine_similarity):
        np.testing.assert_array_equal(measure(tokens), measure(tokens.copy()))
    got = qm.merge_tokens(tokens, labels, 5)
    wanted = qm.merge_tokens(tokens.copy(), np.ascontiguousarray(labels), 5)
    np.testing.assert_array_equal(got, wanted)


def test_empty_batches_launch_nothing():
    tokens = np.zeros((0, 5, 3), np.float32)
    assert qm.self_attention_entropy(tokens).shape == (0, 5)
    assert qm.select_tokens(tokens[..., 0], 2).shape == (0, 2)
    assert qm.merge_tokens(tokens, np.zeros((0, 5), int), 2).shape == (0, 2, 3)
    assert qm.cosine_similarity(tokens).shape == (0, 5, 5)


@dtypes
@pytest.mark.parametrize("num_tokens", [n for n in SIZES if n in (1, 32, 33, 129)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("learned", [None, 300])
def test_transformer_prior(dtype, num_tokens, norm, learned):
    """129 tokens take two tiles of rows and every warp; one takes a warp an output."""
    heads, width = (2, 6) if num_tokens == 33 else (1, 40)
    prior = qm.TransformerPrior.init(
        5, hidden_dim=heads * width, num_heads=heads, num_layers=1, mlp_dim=7,
        norm=norm, num_positions=learned,
    )  # fmt: skip
    rng = np.random.default_rng(num_tokens)
    tokens = random((2, num_tokens, 5), dtype)
    counts = np.array([num_tokens, -(-num_tokens // 2)])
    positions = np.sort(rng.choice(300, (2, num_tokens)), axis=-1)
    sizes = rng.integers(0, 4, (2, num_tokens))
    for reverse in (False, True):
        got = prior.predict(
            tokens, reverse=reverse, num_groups=counts, positions=positions, sizes=sizes
        )
        weights = prior.backward if reverse else prior.forward
        for b, k in enumerate(counts):
            given = tokens[b, :k].astype(np.float64), weights, heads, reverse
            wanted = oracle.transformer(*given, positions[b, :k], sizes[b, :k])
            assert_close(got[b, :k], wanted, dtype)


@dtypes
def test_attention_to_more_keys_than_a_block_has_threads(dtype):
    """The maximum rises from one pass to the next, and what was summed fades."""
    query, keys, values = (
        random((1, 1, 2, 16), dtype, 1),
        random((1, 2, 640, 16), dtype, 2, np.arange(640)[:, None] / 320),
        random((1, 2, 640, 16), dtype, 3),
    )
    place = attention.Span(None, None, np.ones(1, int), 599, False)
    got = attention.attend_cuda(query, keys, values, place)
    q, k, v = (x.astype(np.float64) for x in (query, keys[:, :, :600], values))
    p = softmax_of((q[:, 0, :, None] @ np.swapaxes(k, -1, -2))[:, :, 0] / 4, True, 1)
    assert_close(got[:, 0], (p[:, :, None] @ v[:, :, :600])[:, :, 0], dtype, "stored")


@dtypes
@pytest.mark.parametrize("learned", [None, 200])
def test_transformer_prior_steps(dtype, learned):
    """Past the room that a cache begins with; positions are as a `Merged` has them."""
    prior = qm.TransformerPrior.init(
        5, hidden_dim=12, num_heads=3, num_layers=2, num_positions=learned
    )
    tokens = random((2, 19, 5), dtype)
    sizes, state = np.arange(38).reshape(2, 19) % 4, None
    positions = 3 * np.arange(38, dtype=np.int32).reshape(2, 19)
    wanted = prior.predict(tokens, positions=positions, sizes=sizes)
    for t in range(19):
        known = {"position": positions[:, t], "size": sizes[:, t]}
        got, state = prior.step(tokens[:, t], state, **known)
        assert_close(got, wanted[:, t], dtype)
