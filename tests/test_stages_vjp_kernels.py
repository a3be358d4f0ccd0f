"""The gradients' kernels, interpreted, against the reference in float64.

Which tests of its own hold against differences. The public functions are called, so
that every launcher runs too.
"""

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close
from kernel_cases import dtypes, mask_of, masked, random
from seam import cuda

import qm_cupy as qm
from qm_cupy.priors import linear
from qm_cupy.stages.alignment.alignment_loss import alignment_loss_vjp_reference
from qm_cupy.stages.fidelity.reconstruction_error import (
    _reconstruction_error_vjp_reference,
)
from qm_cupy.stages.merging.merge_tokens import _merge_tokens_vjp_reference
from qm_cupy.stages.merging.unmerge_tokens import unmerge_tokens_vjp_reference

pytestmark = pytest.mark.usefixtures("kernels")

SIZES, WIDTHS = [1, 31, 32, 33, 129, 257], [1, 7, 32, 130]

sizes = pytest.mark.parametrize("num_tokens", SIZES)
ragged = pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])


def labels_of(batch, num_tokens, num_groups):
    """Random labels with some padding and, if there is room, an empty group."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, max(num_groups - 1, 1), size=(batch, num_tokens))
    labels[rng.random((batch, num_tokens)) < 0.1] = -1
    return labels


def wide(x):
    return x.astype(np.float64)


def assert_gradient(got, wanted, dtype, like=None):
    """Compare a gradient in its own dtype, of values of about 1."""
    assert got.dtype == (dtype if like is None else like)
    assert got.flags.c_contiguous
    column = "stored" if got.dtype.itemsize == 2 else "computed"
    assert_close(got, wanted, dtype, column)


@dtypes
@sizes
@masked
@pytest.mark.parametrize("seed", [None, 7])
def test_gumbel_softmax(dtype, num_tokens, masked, seed):
    mask = mask_of(3, num_tokens, masked)
    saliency = abs(random((3, num_tokens), dtype))
    gradient = random((3, num_tokens), dtype, 1)
    valid = np.ones(saliency.shape, np.bool_) if mask is None else mask
    gradient[~valid] = np.nan  # is not read
    options = {"temperature": 0.5, "seed": seed, "mask": mask, "sequence_offset": 4}
    got = qm.gumbel_softmax_vjp(gradient, saliency, **options)
    p = qm.gumbel_softmax(wide(saliency), **options)  # has a test of its own
    g = np.where(valid, wide(gradient), 0)
    wanted = p * (g - (p * g).sum(-1, keepdims=True)) / 0.5
    assert_gradient(got, wanted, dtype)


@dtypes
def test_gumbel_softmax_of_a_token_that_has_nearly_all(dtype):
    saliency = np.array([[3.0, 0.0], [0.0, 3.0]], dtype)
    gradient = np.array([[1.0, 0.0], [1.0, 0.0]], dtype)
    got = qm.gumbel_softmax_vjp(gradient, saliency, temperature=0.5, seed=None)
    wanted = 2 * np.exp(-6) / (1 + np.exp(-6)) ** 2
    tolerance = TOLERANCE[np.dtype(dtype).name]
    rtol = tolerance.stored if got.dtype.itemsize == 2 else tolerance.computed
    np.testing.assert_allclose(wide(got), [[wanted, -wanted]] * 2, rtol=rtol)


@dtypes
@pytest.mark.parametrize("temperature", [1e-46, 1e-320, 1e300])
def test_extreme_temperatures(dtype, temperature):
    saliency = np.array([[0.5, 0.25, 0.75, 0.125]], dtype)
    got = qm.gumbel_softmax_vjp(saliency, saliency, temperature=temperature, seed=None)
    assert_close(got, np.zeros((1, 4)), dtype)


@dtypes
@sizes
def test_saliency_mass(dtype, num_tokens):
    gradient, saliency = (random((2, num_tokens), dtype, seed) for seed in (1, 2))
    p = random((2, num_tokens), np.float32, 3)
    got = qm.saliency_mass_vjp(gradient, saliency, p, epsilon=0.3)
    assert_gradient(got[0], wide(gradient) * wide(p), dtype)
    by_probability = wide(gradient) * (wide(saliency) - 0.3)
    assert got[1].dtype == np.float32
    assert_close(got[1], by_probability, np.float32)


@dtypes
@sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_merge_tokens(dtype, num_tokens, weighted):
    num_groups = max(num_tokens // 4, 1)
    labels = labels_of(2, num_tokens, num_groups)
    mass = None
    if weighted:
        mass = abs(random((2, num_tokens), cuda.accumulation_dtype(dtype), 4)) + 0.2
        mass[:, ::7] = 0
        mass[labels == 1] = 0  # this group takes the plain mean
    for dim in WIDTHS:
        tokens = random((2, num_tokens, dim), dtype)
        gradient = (random((2, num_groups, dim), np.float64, 1) / dim).astype(dtype)
        got = qm.merge_tokens_vjp(gradient, tokens, labels, num_groups, mass=mass)
        weights = None if mass is None else wide(mass)
        given = wide(gradient), wide(tokens), labels, num_groups, weights
        wanted = _merge_tokens_vjp_reference(*given)
        assert_gradient(got[0], wanted[0], dtype)
        if not weighted:
            assert got[1] is None
            continue
        assert_gradient(got[1], wanted[1], dtype, mass.dtype)
        assert not got[1][labels < 0].any()


@dtypes
@sizes
def test_unmerge_tokens(dtype, num_tokens):
    num_groups = max(num_tokens // 4, 1)
    labels = labels_of(2, num_tokens, num_groups)
    for dim in WIDTHS:
        gradient = random((2, num_tokens, dim), dtype)
        got = qm.unmerge_tokens_vjp(gradient, labels, num_groups)
        wanted = unmerge_tokens_vjp_reference(wide(gradient), labels, num_groups)
        assert_gradient(got, wanted, dtype)


@dtypes
@sizes
@masked
def test_reconstruction_error(dtype, num_tokens, masked):
    batch, dim, num_groups = 4, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    labels = labels_of(batch, num_tokens, num_groups)
    tokens = random((batch, num_tokens, dim), dtype)
    merged = random((batch, num_groups, dim), dtype, 9)
    tokens[1] = 0
    gradient = random(batch, np.float32, 2) * num_tokens
    if mask is not None:
        tokens[~mask] = np.nan  # is not read
    counts = np.full(batch, num_groups)
    given = [wide(gradient), wide(tokens), wide(merged), labels, counts, mask]
    wanted = _reconstruction_error_vjp_reference(*given, -np.inf)
    got = qm.reconstruction_error_vjp(
        gradient, tokens, merged, labels=labels, mask=mask
    )
    for x, y in zip(got, wanted, strict=True):
        assert_gradient(x, y, dtype)
        assert not x[1].any()


@dtypes
@ragged
def test_fidelity_loss(dtype, ragged):
    """Of three sequences, one loses nothing and one less than the bound."""
    tokens, merged = random((3, 33, 17), dtype), random((3, 9, 17), dtype, 9)
    counts = np.array([9, 5, 9]) if ragged else np.full(3, 9)
    labels = labels_of(3, 33, 5)
    for b, share in ((0, 0), (1, 0.5)):
        rebuilt = wide(merged)[b, np.maximum(labels[b], 0)]
        tokens[b] = rebuilt + share * wide(tokens)[b]
    options = {"num_groups": counts if ragged else None, "gamma": 0.3}
    for given in (labels, None):
        got = qm.fidelity_loss_vjp(99.0, tokens, merged, labels=given, **options)
        arrays = np.full(3, 33.0), wide(tokens), wide(merged), given, counts, None
        wanted = _reconstruction_error_vjp_reference(*arrays, 0.7**2)
        for x, y in zip(got, wanted, strict=True):
            assert_gradient(x, y, dtype)
        if given is not None:
            assert [x.any() for x in got[0]] == [False, False, True]


def alignment_of(num_groups, dtype, dim=37, hidden_dim=50):
    """Return gradients, merged tokens and a prior."""
    gradient = random((3, 3), np.float32, 5) * dim
    merged = random((3, num_groups, dim), dtype)
    return tuple(gradient), merged, qm.MLPPrior.init(dim, hidden_dim=hidden_dim)


@dtypes
@pytest.mark.parametrize("num_groups", [n for n in SIZES if n < 257])
@ragged
def test_alignment_loss(dtype, num_groups, ragged):
    gradient, merged, prior = alignment_of(num_groups, dtype)
    counts = np.full(3, num_groups)
    if ragged:
        counts[1:] = (num_groups + 1) // 2, 1
        merged[1, counts[1] :] = np.nan  # is not read
    got = qm.alignment_loss_vjp(
        gradient, merged, prior, num_groups=counts if ragged else None
    )
    ahead, behind, total = map(wide, gradient)
    each = ahead + total, behind + total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "is_cuda", lambda x: False)
        wanted = alignment_loss_vjp_reference(each, wide(merged), prior, counts)
    assert_gradient(got[0], wanted[0], dtype)
    assert not got[0][np.arange(num_groups) >= counts[:, None]].any()
    kind = cuda.accumulation_dtype(dtype)
    for mlp, truth in zip(got[1], wanted[1], strict=True):
        for x, y in zip(mlp, truth, strict=True):
            assert_gradient(x, y, dtype, kind)


@pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
def test_weights_of_many_rows_are_summed_by_parts(monkeypatch):
    gradient, merged, prior = alignment_of(33, np.float64)
    whole = qm.alignment_loss_vjp(gradient, merged, prior)
    for rows, most in ((40, 32), (7, 2)):  # 99 rows in parts of 64 and of 64
        monkeypatch.setattr(linear, "_PART_ROWS", rows)
        monkeypatch.setattr(linear, "_MOST_PARTS", most)
        parts = qm.alignment_loss_vjp(gradient, merged, prior)
        np.testing.assert_array_equal(parts[0], whole[0])
        for mlp, other in zip(parts[1], whole[1], strict=True):
            for x, y in zip(mlp, other, strict=True):
                assert_close(x, y)


@pytest.mark.parametrize("kernels", ["optimized"], indirect=True)
def test_products_with_tf32_are_near_the_truth():
    """Of a layer alone: which of its units fire is the forward's to say."""
    x, weight = random((99, 37), np.float32), random((50, 37), np.float32, 1)
    gradient = random((99, 50), np.float32, 2) / 99
    plain = linear.linear_vjp_cuda(gradient, x, weight)
    with qm.allow_tf32():
        got = linear.linear_vjp_cuda(gradient, x, weight)
    for y, z in zip(got[:2], plain[:2], strict=True):
        assert_close(y, z, "tf32")
        assert (y != z).any()
    np.testing.assert_array_equal(got[2], plain[2])  # the bias has no products


@dtypes
def test_wild_labels_count_as_padding(dtype):
    """Nobody looks at labels on a GPU; the interpreter looks at the kernels."""
    tokens, merged = random((2, 70, 9), dtype), random((2, 5, 9), dtype, 1)
    tame = labels_of(2, 70, 5).astype(np.int32)
    tame[:, 60:] = -1
    wild = tame.copy()
    wild[:, 60:] = np.array([5, 6, -2, 1000, -1000, 2**31 - 1, -(2**31), 70, 99, 5])
    mass, slope = abs(tokens[..., 0]), np.ones(2)
    for vjp in (
        lambda labels: qm.merge_tokens_vjp(merged, tokens, labels, 5, mass=mass),
        lambda labels: qm.merge_tokens_vjp(merged, tokens, labels, 5)[:1],
        lambda labels: qm.unmerge_tokens_vjp(tokens, labels, 5),
        lambda labels: qm.reconstruction_error_vjp(
            slope, tokens, merged, labels=labels
        ),
    ):
        for x, y in zip(vjp(wild), vjp(tame), strict=True):
            np.testing.assert_array_equal(x, y)


@dtypes
def test_wild_counts_stay_within_their_arrays(dtype, monkeypatch):
    gradient, merged, prior = alignment_of(6, dtype)
    found = []
    for counts in ([-3, 1000, 4], [0, 6, 4]):
        given = np.array(counts, np.int32)
        monkeypatch.setattr(cuda, "device_counts", lambda _, given=given: (given, 6))
        slope, weights = qm.alignment_loss_vjp(gradient, merged, prior)
        found.append([slope, *weights[0], *weights[1]])
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_one_sequence_is_a_batch_of_one():
    tokens, merged = random((40, 9), np.float32), random((5, 9), np.float32, 1)
    labels, score = labels_of(1, 40, 5)[0], abs(tokens[:, 0])
    prior, one = qm.MLPPrior.init(9, hidden_dim=5), np.float32(1)
    for vjp, *arrays in (
        (lambda g, s: qm.gumbel_softmax_vjp(g, s), tokens[:, 1], score),
        (lambda g, s: qm.saliency_mass_vjp(g, s, s), tokens[:, 1], score),
        (
            lambda g, x, k, m: qm.merge_tokens_vjp(g, x, k, 5, mass=m),
            *(merged, tokens, labels, score),
        ),
        (lambda g, k: qm.unmerge_tokens_vjp(g, k, 5), tokens, labels),
        (
            lambda x, y: qm.reconstruction_error_vjp(np.ones(x.shape[:-2]), x, y),
            *(tokens, merged),
        ),
        (lambda x, y: qm.fidelity_loss_vjp(one, x, y), tokens, merged),
        (
            lambda x: qm.alignment_loss_vjp((np.ones(x.shape[:-2]),) * 3, x, prior)[0],
            merged,
        ),
    ):
        single, many = vjp(*arrays), vjp(*(x[None] for x in arrays))
        pairs = [(single, many)]
        if isinstance(single, tuple):
            pairs = zip(single, many, strict=True)
        for x, y in pairs:
            np.testing.assert_array_equal(x[None], y)


def test_views_are_read_as_they_are():
    """Launchers copy what is not C-contiguous; kernels know no strides."""
    wide = random((80, 2, 18), np.float16)
    tokens = wide.transpose(1, 0, 2)[:, ::2, ::2]  # (2, 40, 9)
    merged, labels = tokens[:, :5], labels_of(40, 2, 5).T
    got = qm.merge_tokens_vjp(merged, tokens, labels, 5, mass=tokens[..., 0] ** 2)
    given = merged.copy(), tokens.copy(), np.ascontiguousarray(labels), 5
    wanted = qm.merge_tokens_vjp(*given, mass=tokens[..., 0].copy() ** 2)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_batches_have_weights_of_zero():
    tokens, merged = np.zeros((0, 5, 3), np.float32), np.zeros((0, 2, 3), np.float32)
    labels, none = np.zeros((0, 5), int), np.zeros(0)
    scores = tokens[..., 0]
    by_tokens, by_mass = qm.merge_tokens_vjp(merged, tokens, labels, 2, mass=scores)
    assert (by_tokens.shape, by_mass.shape) == ((0, 5, 3), (0, 5))
    assert qm.unmerge_tokens_vjp(tokens, labels, 2).shape == (0, 2, 3)
    assert qm.gumbel_softmax_vjp(scores, scores).shape == (0, 5)
    by_tokens, _ = qm.reconstruction_error_vjp(none, tokens, merged, labels=labels)
    assert by_tokens.shape == (0, 5, 3)
    prior = qm.MLPPrior.init(3, hidden_dim=4)
    slope, weights = qm.alignment_loss_vjp((none,) * 3, tokens, prior)
    assert slope.shape == (0, 5, 3)
    for mlp in weights:
        assert not any(w.any() for w in mlp)
