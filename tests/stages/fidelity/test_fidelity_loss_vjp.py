"""The gradient of the fidelity loss: against differences, torch, and at the bound."""

import numpy as np
import pytest
from differences import assert_slope
from rebuilt_cases import LABELS, both, options_of, padded

import qm_cupy as qm


@pytest.fixture
def problem(rng):
    """Return gradient (2,), tokens (2, 9, 3) and merged tokens (2, 5, 3)."""
    return (
        rng.standard_normal(2),
        rng.standard_normal((2, 9, 3)),
        rng.standard_normal((2, 5, 3)),
    )


@both
@padded
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_fidelity_loss_differences(problem, labelled, masked, gamma):
    _, tokens, merged = problem
    merged *= 0.3  # errors of about 1, on both sides of the bound 1 of γ = 0
    options = {"gamma": gamma, **options_of(labelled, masked, ragged=False)}
    got = qm.fidelity_loss_vjp(1.7, tokens, merged, **options)

    def loss(x, y):
        return 1.7 * qm.fidelity_loss(x, y, **options)

    assert_slope(got[0], lambda x: loss(x, merged), tokens)
    assert_slope(got[1], lambda y: loss(tokens, y), merged)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_torch(problem, precision):
    torch = pytest.importorskip("torch")
    _, tokens, merged = (x.astype(precision) for x in problem)
    x, y = (torch.tensor(a, requires_grad=True) for a in (tokens, merged))
    index = torch.tensor(np.maximum(LABELS, 0))[..., None].expand(tokens.shape)
    kept = torch.tensor(LABELS >= 0)[..., None]  # not padding
    gap = (x - y.gather(1, index)) * kept
    error = gap.square().sum((1, 2)) / (x * kept).square().sum((1, 2))
    loss = torch.relu(error - 0.04).mean()  # (1 - 0.8)² = 0.04
    loss.backward()
    np.testing.assert_allclose(
        qm.fidelity_loss(tokens, merged, labels=LABELS), loss.item(), rtol=1e-6
    )
    got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=LABELS)
    for slope, wanted in zip(got, (x.grad, y.grad), strict=True):
        assert slope.dtype == precision
        np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-5)


def test_only_errors_above_the_bound_have_a_gradient(problem):
    _, tokens, merged = problem
    tokens[0] = merged[0][np.maximum(LABELS[0], 0)]  # the error of sequence 0 is 0
    got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=LABELS, gamma=0.8)
    for slope in got:
        assert not slope[0].any()
        assert slope[1].any()


def test_at_the_bound_the_gradient_is_zero():
    tokens, merged = np.array([[1.0], [1.0]]), np.array([[0.5]])
    labels = np.array([0, 0])
    # (0.25 + 0.25) / (1 + 1) is exact in floating point, and so is (1 - 0.5)².
    assert qm.reconstruction_error(tokens, merged, labels=labels) == 0.25
    for gamma, moves in ((0.5, False), (0.51, True)):
        got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=labels, gamma=gamma)
        assert [slope.any() for slope in got] == [moves, moves]


def test_gradients_of_half_precision_keep_their_digits(rng):
    """A float16 gradient of 1, divided by 7 sequences, is not rounded to float16."""
    tokens, merged = rng.random((7, 4, 3)), rng.random((7, 2, 3))
    one = np.ones((), np.float16)
    got = qm.fidelity_loss_vjp(one, tokens, merged, gamma=1.0)
    for x, y in zip(
        got, qm.fidelity_loss_vjp(1.0, tokens, merged, gamma=1.0), strict=True
    ):
        np.testing.assert_array_equal(x, y)
