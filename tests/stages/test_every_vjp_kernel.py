"""Properties that the gradient kernels of all stages have in common.

They concern labels and counts out of range, one sequence without a batch axis, the
layout of arrays, and empty batches. The fixture `kernels` runs a test with basic and
with optimized kernels, in the PTX interpreter (tests/ptx), which raises if a kernel
accesses memory outside its arrays. A vector–Jacobian product (`vjp`) is the gradient of
a loss with respect to the inputs, from its gradient with respect to the results.
"""

import numpy as np
import pytest
from kernel_cases import dtypes, labels_of, random
from seam import cuda
from vjp_cases import alignment_of

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
def test_labels_out_of_range_count_as_padding(dtype):
    """Labels on a GPU are not checked, so kernels must accept any value."""
    tokens, merged = random((2, 70, 9), dtype), random((2, 5, 9), dtype, 1)
    padded = labels_of(2, 70, 5).astype(np.int32)
    padded[:, 60:] = -1
    # The same labels, but the padding has labels out of range: K = 5 itself, above K,
    # below -1, and the ends of int32.
    out_of_range = padded.copy()
    out_of_range[:, 60:] = np.array(
        [5, 6, -2, 1000, -1000, 2**31 - 1, -(2**31), 70, 99, 5]
    )
    mass, error_gradient = abs(tokens[..., 0]), np.ones(2)
    for vjp in (
        lambda labels: qm.merge_tokens_vjp(merged, tokens, labels, 5, mass=mass),
        lambda labels: qm.merge_tokens_vjp(merged, tokens, labels, 5)[:1],
        lambda labels: qm.unmerge_tokens_vjp(tokens, labels, 5),
        lambda labels: qm.reconstruction_error_vjp(
            error_gradient, tokens, merged, labels=labels
        ),
    ):
        for x, y in zip(vjp(out_of_range), vjp(padded), strict=True):
            np.testing.assert_array_equal(x, y)


@dtypes
def test_counts_out_of_range_are_clamped(dtype, monkeypatch):
    # The public functions check counts, so the test replaces the function that passes
    # them to the kernels. It returns (counts on the device, the largest K).
    gradient, merged, prior = alignment_of(6, dtype)
    results = []
    # Counts below 0 and above K = 6 are clamped to 0 and 6.
    for counts in ([-3, 1000, 4], [0, 6, 4]):
        k = np.array(counts, np.int32)  # (B,)
        monkeypatch.setattr(cuda, "counts_on_device", lambda *_, k=k: (k, 6))
        merged_gradient, weights = qm.alignment_loss_vjp(gradient, merged, prior)
        results.append([merged_gradient, *weights[0], *weights[1]])
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_one_sequence_gives_the_bits_of_a_batch_of_one():
    tokens, merged = random((40, 9), np.float32), random((5, 9), np.float32, 1)
    labels, score = labels_of(1, 40, 5)[0], abs(tokens[:, 0])
    prior, loss_gradient = qm.MLPPrior.init(9, hidden_dim=5), np.float32(1)
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
        (lambda x, y: qm.fidelity_loss_vjp(loss_gradient, x, y), tokens, merged),
        (
            lambda x: qm.alignment_loss_vjp((np.ones(x.shape[:-2]),) * 3, x, prior)[0],
            merged,
        ),
    ):
        single, batch = vjp(*arrays), vjp(*(x[None] for x in arrays))
        pairs = [(single, batch)]
        if isinstance(single, tuple):  # gradients of several inputs
            pairs = zip(single, batch, strict=True)
        for x, y in pairs:
            np.testing.assert_array_equal(x[None], y)


def test_views_give_the_results_of_their_copies():
    """Kernels have no strides, so launchers copy arrays that are not C-contiguous."""
    wide = random((80, 2, 18), np.float16)
    tokens = wide.transpose(1, 0, 2)[:, ::2, ::2]  # (2, 40, 9)
    merged, labels = tokens[:, :5], labels_of(40, 2, 5).T
    got = qm.merge_tokens_vjp(merged, tokens, labels, 5, mass=tokens[..., 0] ** 2)
    copies = merged.copy(), tokens.copy(), np.ascontiguousarray(labels), 5
    wanted = qm.merge_tokens_vjp(*copies, mass=tokens[..., 0].copy() ** 2)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_batches_give_empty_gradients_and_weights_of_zero():
    # The gradients of arrays keep their shapes. The gradients of a prior's weights are
    # sums over the batch: they must be 0, although there is no sequence.
    tokens, merged = np.zeros((0, 5, 3), np.float32), np.zeros((0, 2, 3), np.float32)
    labels, no_values = np.zeros((0, 5), int), np.zeros(0)
    scores = tokens[..., 0]
    x_gradient, m_gradient = qm.merge_tokens_vjp(merged, tokens, labels, 2, mass=scores)
    assert (x_gradient.shape, m_gradient.shape) == ((0, 5, 3), (0, 5))
    assert qm.unmerge_tokens_vjp(tokens, labels, 2).shape == (0, 2, 3)
    assert qm.gumbel_softmax_vjp(scores, scores).shape == (0, 5)
    x_gradient, _ = qm.reconstruction_error_vjp(
        no_values, tokens, merged, labels=labels
    )
    assert x_gradient.shape == (0, 5, 3)
    prior = qm.MLPPrior.init(3, hidden_dim=4)
    merged_gradient, weights = qm.alignment_loss_vjp((no_values,) * 3, tokens, prior)
    assert merged_gradient.shape == (0, 5, 3)
    for mlp in weights:  # the forward and the backward model
        assert not any(w.any() for w in mlp)
