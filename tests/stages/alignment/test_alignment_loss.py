"""The alignment loss: against a loop over t, with padding, and in reverse.

A prior has a forward network, which predicts merged token t + 1 from tokens 1..t, and a
backward network, which predicts token t - 1 from tokens t..K.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm


def losses_of_a_loop_over_t(merged, prior):
    """Return (forward, backward, total) of one sequence, one prediction at a time."""
    return oracle.alignment_losses(
        merged,
        lambda x: oracle.mlp(x, *prior.forward),
        lambda x: oracle.mlp(x, *prior.backward),
    )


# K = 1 has no pair of neighbours: the loss is 0, not 0 / 0.
@pytest.mark.parametrize("num_groups", [1, 2, 3, 17])
def test_losses_against_a_loop_over_t(rng, dtype, num_groups):
    prior = qm.MLPPrior.init(5, hidden_dim=7, seed=3)
    merged = rng.standard_normal((2, num_groups, 5)).astype(dtype)
    got = qm.alignment_loss(merged, prior)
    for b in range(2):
        wanted = losses_of_a_loop_over_t(merged[b], prior)
        for loss, truth in zip(got, wanted, strict=True):
            assert loss.dtype == np.result_type(dtype, np.float32)
            assert_close(loss[b], truth, dtype)


def test_padding_does_not_count(rng):
    prior = qm.MLPPrior.init(4, seed=1)
    merged = rng.standard_normal((3, 9, 4))  # padding is random, not zeros
    counts = np.array([9, 1, 4])  # a full, a single and a partial sequence
    got = qm.alignment_loss(merged, prior, num_groups=counts)
    for b, count in enumerate(counts):
        wanted = qm.alignment_loss(merged[b, :count], prior)
        assert_close([loss[b] for loss in got], list(wanted))
    assert got.total[1] == 0  # K = 1


def test_one_sequence_gives_scalars(rng):
    loss = qm.alignment_loss(rng.standard_normal((6, 4)), qm.MLPPrior.init(4))
    assert loss.total.shape == ()
    assert_close(loss.total, loss.forward + loss.backward)


def test_reading_backwards_is_the_mirror_image(rng):
    prior = qm.MLPPrior.init(4, seed=2)
    mirrored = qm.MLPPrior(forward=prior.backward, backward=prior.forward)
    merged = rng.standard_normal((8, 4))
    # Reversed tokens and exchanged networks must exchange the two losses.
    original = qm.alignment_loss(merged, prior)
    reversed_ = qm.alignment_loss(merged[::-1], mirrored)
    assert_close(original.forward, reversed_.backward)
    assert_close(original.backward, reversed_.forward)


# The tokens are (2, 5, 4). Without a check, (5, 4) and (2, 5, 1) would broadcast.
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 4), (2, 5, 1), (2, 1, 4)])
@pytest.mark.parametrize("wrong_reverse", [False, True])
def test_prediction_of_a_wrong_shape_raises(shape, wrong_reverse):
    """With `reverse=wrong_reverse`, the prediction has the wrong shape."""

    class Prior:
        def predict(self, tokens, *, reverse=False, **options):
            return np.ones(shape if reverse == wrong_reverse else tokens.shape)

    with pytest.raises(ValueError, match="`prediction` must have shape"):
        qm.alignment_loss(np.ones((2, 5, 4)), Prior())
