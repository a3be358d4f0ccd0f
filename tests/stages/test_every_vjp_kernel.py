"""Properties of the gradients' kernels of all stages: wild labels, views."""

import numpy as np
import pytest
from kernel_cases import dtypes, labels_of, random
from seam import cuda
from vjp_cases import alignment_of

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
def test_wild_labels_count_as_padding(dtype):
    """Labels are not checked on a GPU, so kernels must stay within their arrays.

    The interpreter of the kernels raises if one does not.
    """
    tokens, merged = random((2, 70, 9), dtype), random((2, 5, 9), dtype, 1)
    tame = labels_of(2, 70, 5).astype(np.int32)
    tame[:, 60:] = -1
    wild = tame.copy()
    # K itself, beyond K, below -1, and the ends of int32.
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
    # The public functions check counts, so the kernels get wild ones by a patch.
    gradient, merged, prior = alignment_of(6, dtype)
    results = []
    # Counts below 0 and above K are clamped to 0 and K.
    for counts in ([-3, 1000, 4], [0, 6, 4]):
        fixed = np.array(counts, np.int32)
        monkeypatch.setattr(cuda, "device_counts", lambda _, fixed=fixed: (fixed, 6))
        slope, weights = qm.alignment_loss_vjp(gradient, merged, prior)
        results.append([slope, *weights[0], *weights[1]])
    for got, wanted in zip(*results, strict=True):
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
        # The same values in a batch of one must give the same bits.
        single, many = vjp(*arrays), vjp(*(x[None] for x in arrays))
        pairs = [(single, many)]
        if isinstance(single, tuple):
            pairs = zip(single, many, strict=True)
        for x, y in pairs:
            np.testing.assert_array_equal(x[None], y)


def test_views_are_read_as_they_are():
    """Launchers copy arrays that are not C-contiguous: kernels take no strides."""
    wide = random((80, 2, 18), np.float16)
    tokens = wide.transpose(1, 0, 2)[:, ::2, ::2]  # (2, 40, 9)
    merged, labels = tokens[:, :5], labels_of(40, 2, 5).T
    got = qm.merge_tokens_vjp(merged, tokens, labels, 5, mass=tokens[..., 0] ** 2)
    copies = merged.copy(), tokens.copy(), np.ascontiguousarray(labels), 5
    wanted = qm.merge_tokens_vjp(*copies, mass=tokens[..., 0].copy() ** 2)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_batches_have_weights_of_zero():
    # Shapes are kept. The gradients of a prior's weights are sums over the batch: they
    # must be written as 0, although there is no sequence.
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
