"""The gradient of the reconstruction error: against differences, and special cases.

The special cases are zeros, means of groups, padding, and very large or small tokens.
Differences are central differences: (f(x + h) - f(x - h)) / 2h.
"""

import numpy as np
import pytest
from differences import assert_slope
from rebuilt_cases import LABELS, MASK, labelled_or_nearest, masked_or_full, options_of

import qm_cupy as qm

counted = pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])


@pytest.fixture
def problem(rng):
    """Return gradient (2,), tokens (2, 9, 3) and merged tokens (2, 5, 3)."""
    return (
        rng.standard_normal(2),
        rng.standard_normal((2, 9, 3)),
        rng.standard_normal((2, 5, 3)),
    )


@labelled_or_nearest
@masked_or_full
@counted
def test_gradient_against_differences(problem, labelled, masked, ragged):
    gradient, tokens, merged = problem
    options = options_of(labelled, masked, ragged)
    got = qm.reconstruction_error_vjp(gradient, tokens, merged, **options)

    def loss(x, y):
        return (gradient * qm.reconstruction_error(x, y, **options)).sum()

    assert_slope(got[0], lambda x: loss(x, merged), tokens)
    assert_slope(got[1], lambda y: loss(tokens, y), merged)
    if masked:
        assert not got[0][~MASK].any()  # padding has gradient 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_sequence_of_zeros_has_gradient_zero(value):
    """The gradient is 0 whether zeros are rebuilt exactly (error 0) or not (inf)."""
    zeros, merged, labels = np.zeros((3, 2)), np.full((1, 2), value), np.zeros(3, int)
    for vjp in (qm.reconstruction_error_vjp, qm.fidelity_loss_vjp):
        for gradient in vjp(1.0, zeros, merged, labels=labels):
            assert not gradient.any()


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_gradient_at_large_and_small_scales(problem, scale):
    """At scale s, the error is the same, and the gradient is divided by s.

    The squares of 1e200 and of 1e-200 leave the range of float64.
    """
    gradient, tokens, merged = problem
    wanted = qm.reconstruction_error_vjp(gradient, tokens, merged, labels=LABELS)
    got = qm.reconstruction_error_vjp(
        gradient, tokens * scale, merged * scale, labels=LABELS
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x * scale, y, rtol=1e-12)


def test_the_mean_of_a_group_has_gradient_zero(problem):
    """The mean of a group minimises its squared error, so its gradient is 0."""
    gradient, tokens, _ = problem
    merged = qm.merge_tokens(tokens, LABELS, 5)
    _, merged_gradient = qm.reconstruction_error_vjp(
        gradient, tokens, merged, labels=LABELS
    )
    np.testing.assert_allclose(merged_gradient, 0, atol=1e-14)


def test_padding_is_not_read(problem):
    gradient, tokens, merged = problem
    options = options_of(labelled=True, masked=True, ragged=False)
    wanted = qm.reconstruction_error_vjp(gradient, tokens, merged, **options)
    # Group 4 has no member in LABELS.
    tokens[~MASK], merged[:, 4] = np.nan, np.nan
    with qm.check_finite(False):  # otherwise NaN raises an error
        got = qm.reconstruction_error_vjp(gradient, tokens, merged, **options)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_gradient_of_one_sequence_may_be_a_number(problem):
    gradient, tokens, merged = problem
    batch_gradients = qm.reconstruction_error_vjp(
        gradient, tokens, merged, labels=LABELS
    )
    # A Python float, a NumPy scalar and an array of shape () must give the same bits.
    for number in (float(gradient[0]), gradient[0], gradient[:1].reshape(())):
        gradients = qm.reconstruction_error_vjp(
            number, tokens[0], merged[0], labels=LABELS[0]
        )
        for x, y in zip(gradients, batch_gradients, strict=True):
            np.testing.assert_array_equal(x, y[0])


def test_empty_batch():
    tokens, merged = np.ones((0, 4, 3)), np.ones((0, 2, 3))
    shapes = [(0, 4, 3), (0, 2, 3)]
    got = qm.reconstruction_error_vjp(np.ones(0), tokens, merged)
    assert [x.shape for x in got] == shapes
    # The fidelity loss is a mean over B = 0 sequences: it must not divide by 0.
    got = qm.fidelity_loss_vjp(1.0, tokens, merged)
    assert [x.shape for x in got] == shapes


def test_bad_input(problem):
    gradient, tokens, merged = problem
    with pytest.raises(ValueError, match=r"`gradient` must have shape \(B\) = \(2,\)"):
        qm.reconstruction_error_vjp(gradient[:1], tokens, merged)
    # The fidelity loss is one number for the batch, so its gradient has shape ().
    with pytest.raises(ValueError, match=r"`gradient` must have shape \(\) = \(\)"):
        qm.fidelity_loss_vjp(gradient, tokens, merged)
    with pytest.raises(TypeError, match="`gradient` must be a number, got list"):
        qm.fidelity_loss_vjp([1.0], tokens, merged)
    with pytest.raises(TypeError, match="`gradient` must be an array, got float"):
        qm.reconstruction_error_vjp(1.0, tokens, merged)
    with pytest.raises(ValueError, match="`gradient` must lie in"):
        qm.fidelity_loss_vjp(np.nan, tokens, merged)
    with pytest.raises(ValueError, match="`gamma` must lie in"):
        qm.fidelity_loss_vjp(1.0, tokens, merged, gamma=2.0)
    with pytest.raises(TypeError, match="`merged` must be float64 like `tokens`"):
        qm.reconstruction_error_vjp(gradient, tokens, merged.astype("f4"))
