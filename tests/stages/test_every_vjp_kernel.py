"""What holds for the gradients' kernels of all stages: wild labels, views."""

import numpy as np
import pytest
from kernel_cases import dtypes, labels_of, random
from seam import cuda
from vjp_cases import alignment_of

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


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
