"""The gradient of the fidelity loss: against differences, torch, and at the bound.

The loss is the mean of max(0, e_b - (1 - γ)²) over the errors e_b of the sequences.
Differences are central differences: (f(x + h) - f(x - h)) / 2h.
"""

import numpy as np
import pytest
from differences import assert_slope
from rebuilt_cases import LABELS, labelled_or_nearest, masked_or_full, options_of

import qm_cupy as qm


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
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_gradient_against_differences(problem, labelled, masked, gamma):
    _, tokens, merged = problem
    # Errors are about 1, so some are below and some above the bound of γ = 0, which is
    # 1.
    merged *= 0.3
    options = {"gamma": gamma, **options_of(labelled, masked, ragged=False)}
    got = qm.fidelity_loss_vjp(1.7, tokens, merged, **options)

    def loss(x, y):
        return 1.7 * qm.fidelity_loss(x, y, **options)

    assert_slope(got[0], lambda x: loss(x, merged), tokens)
    assert_slope(got[1], lambda y: loss(tokens, y), merged)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_gradient_against_torch(problem, precision):
    torch = pytest.importorskip("torch")
    _, tokens, merged = (torch_tokens.astype(precision) for torch_tokens in problem)
    torch_tokens, torch_merged = (
        torch.tensor(a, requires_grad=True) for a in (tokens, merged)
    )
    index = torch.tensor(np.maximum(LABELS, 0))[..., None].expand(tokens.shape)
    valid = torch.tensor(LABELS >= 0)[..., None]  # not padding
    gap = (torch_tokens - torch_merged.gather(1, index)) * valid
    error = gap.square().sum((1, 2)) / (torch_tokens * valid).square().sum((1, 2))
    loss = torch.relu(error - 0.04).mean()  # (1 - 0.8)² = 0.04
    loss.backward()
    np.testing.assert_allclose(
        qm.fidelity_loss(tokens, merged, labels=LABELS), loss.item(), rtol=1e-6
    )
    got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=LABELS)
    for gradient, wanted in zip(
        got, (torch_tokens.grad, torch_merged.grad), strict=True
    ):
        assert gradient.dtype == precision
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_only_errors_above_the_bound_have_a_gradient(problem):
    _, tokens, merged = problem
    tokens[0] = merged[0][np.maximum(LABELS[0], 0)]  # the error of sequence 0 is 0
    got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=LABELS, gamma=0.8)
    for gradient in got:
        assert not gradient[0].any()
        assert gradient[1].any()


def test_at_the_bound_the_gradient_is_zero():
    tokens, merged = np.array([[1.0], [1.0]]), np.array([[0.5]])
    labels = np.array([0, 0])
    # (0.25 + 0.25) / (1 + 1) is exact in floating point, and so is (1 - 0.5)².
    assert qm.reconstruction_error(tokens, merged, labels=labels) == 0.25
    for gamma, has_gradient in ((0.5, False), (0.51, True)):
        got = qm.fidelity_loss_vjp(1.0, tokens, merged, labels=labels, gamma=gamma)
        assert [gradient.any() for gradient in got] == [has_gradient, has_gradient]


def test_a_float16_gradient_is_divided_in_float64(rng):
    """The gradient 1 is divided by 7 sequences; 1 / 7 is not rounded to float16."""
    tokens, merged = rng.random((7, 4, 3)), rng.random((7, 2, 3))
    gradient = np.ones((), np.float16)
    got = qm.fidelity_loss_vjp(gradient, tokens, merged, gamma=1.0)
    for x, y in zip(
        got, qm.fidelity_loss_vjp(1.0, tokens, merged, gamma=1.0), strict=True
    ):
        np.testing.assert_array_equal(x, y)
