"""The gradient of the alignment loss: against differences, torch, and by hand."""

import numpy as np
import pytest
from differences import assert_slope

import qm_cupy as qm


def prior_of(dim, hidden_dim, seed=3):
    """Return a prior with weights in float64."""
    prior = qm.MLPPrior.init(dim, hidden_dim=hidden_dim, seed=seed)
    wide = (
        qm.MLP(*(w.astype(np.float64) for w in network))
        for network in (prior.forward, prior.backward)
    )
    return qm.MLPPrior(*wide)


def loss_of(gradient, merged, prior, counts=None):
    """Return Σ gradient · loss, a number with the gradient that the VJP returns."""
    losses = qm.alignment_loss(merged, prior, num_groups=counts)
    pairs = zip(gradient, losses, strict=True)
    return sum(np.sum(slope * loss) for slope, loss in pairs)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 18])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_differences(rng, num_groups, ragged):
    merged = rng.standard_normal((3, num_groups, 4))
    gradient = tuple(rng.standard_normal((3, 3)))
    counts = np.array([num_groups, (num_groups + 1) // 2, 1]) if ragged else None
    prior = prior_of(4, 6)  # small: differences evaluate the loss twice per entry
    slope, weights = qm.alignment_loss_vjp(gradient, merged, prior, num_groups=counts)
    assert_slope(slope, lambda x: loss_of(gradient, x, prior, counts), merged)
    networks = [prior.forward, prior.backward]
    for i, network in enumerate(networks):
        for name, weight in network._asdict().items():
            # The defaults bind the current i and name, not those of the last iteration.
            def loss(w, i=i, name=name):
                both = list(networks)
                both[i] = both[i]._replace(**{name: w})
                return loss_of(gradient, merged, qm.MLPPrior(*both), counts)

            assert_slope(getattr(weights[i], name), loss, weight)
    if ragged:
        padding = np.arange(num_groups) >= counts[:, None]
        assert not slope[padding].any()


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_torch(rng, precision):
    torch = pytest.importorskip("torch")
    merged = rng.standard_normal((2, 7, 4)).astype(precision)
    prior = qm.MLPPrior.init(4, hidden_dim=6)
    x = torch.tensor(merged, requires_grad=True)
    networks = [
        [torch.tensor(w.astype(precision), requires_grad=True) for w in network]
        for network in (prior.forward, prior.backward)
    ]

    def mean_error(x, network):
        first, shift, second, last = network
        count = torch.arange(1, 8, dtype=x.dtype)[:, None]  # (K, 1)
        hidden = torch.relu(x.cumsum(1) / count @ first.T + shift)
        predicted = hidden @ second.T + last
        return (predicted[:, :-1] - x[:, 1:]).square().mean((1, 2))

    # The backward network reads the flipped tokens in the same way.
    right, left = mean_error(x, networks[0]), mean_error(x.flip(1), networks[1])
    (right + left).sum().backward()
    ones, zeros = np.ones(2, precision), np.zeros(2, precision)
    slope, weights = qm.alignment_loss_vjp((zeros, zeros, ones), merged, prior)
    assert slope.dtype == precision
    np.testing.assert_allclose(slope, x.grad, rtol=1e-5, atol=1e-5)
    for mlp, network in zip(weights, networks, strict=True):
        for got, wanted in zip(mlp, network, strict=True):
            assert got.dtype == precision
            np.testing.assert_allclose(got, wanted.grad, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_total_is_the_sum_of_both_directions(rng):
    merged, prior = rng.standard_normal((2, 6, 4)), qm.MLPPrior.init(4)
    one, none = np.ones(2), np.zeros(2)
    total = qm.alignment_loss_vjp((none, none, one), merged, prior)
    both = qm.alignment_loss_vjp((one, one, none), merged, prior)
    forward = qm.alignment_loss_vjp(qm.AlignmentLoss(one, none, none), merged, prior)
    np.testing.assert_array_equal(total[0], both[0])
    for x, y in zip(total[1][0], forward[1][0], strict=True):
        np.testing.assert_array_equal(x, y)
    # The forward loss does not depend on the backward network.
    assert not any(w.any() for w in forward[1][1])


def test_fit_follows_the_gradient_of_the_loss(rng):
    """The gradient in `fit` and the gradient of the forward loss are one formula."""
    from qm_cupy.priors.training import gradient, prefix_pairs

    merged, prior = rng.standard_normal((1, 9, 4)), prior_of(4, 6)
    ((x, y),) = prefix_pairs(merged, np.array([9]), reverse=False)
    wanted = gradient(prior.forward, x, y)
    _, (got, _) = qm.alignment_loss_vjp(
        (np.ones(1),) * 2 + (np.zeros(1),), merged, prior
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_padding_is_not_read(rng):
    merged, prior = rng.standard_normal((2, 6, 4)), qm.MLPPrior.init(4)
    counts, gradient = np.array([6, 3]), tuple(np.ones((3, 2)))
    wanted = qm.alignment_loss_vjp(gradient, merged, prior, num_groups=counts)
    merged[1, 3:] = np.nan  # even 0 · NaN would show in the result
    with qm.check_finite(False):  # else the NaN is refused
        got = qm.alignment_loss_vjp(gradient, merged, prior, num_groups=counts)
    np.testing.assert_array_equal(got[0], wanted[0])
    for mlp, other in zip(got[1], wanted[1], strict=True):
        for x, y in zip(mlp, other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_sizes_of_a_merged_give_the_counts(rng):
    # Sequence 1 has 3 groups and 2 padded groups of size 0.
    merged = qm.quickmerge(rng.standard_normal((2, 12, 4)), np.array([5, 3]))
    prior, gradient = qm.MLPPrior.init(4), tuple(np.ones((3, 2)))
    got = qm.alignment_loss_vjp(gradient, merged, prior)
    wanted = qm.alignment_loss_vjp(
        gradient, merged.tokens, prior, num_groups=np.array([5, 3])
    )
    np.testing.assert_array_equal(got[0], wanted[0])


def test_gradients_of_one_sequence_may_be_numbers(rng):
    merged, prior = rng.standard_normal((2, 6, 4)), qm.MLPPrior.init(4)
    # Losses of one sequence have shape (): Python and NumPy numbers are gradients too.
    many, _ = qm.alignment_loss_vjp(tuple(np.ones((3, 2))), merged, prior)
    one, weights = qm.alignment_loss_vjp((1, 1.0, np.float32(1)), merged[0], prior)
    np.testing.assert_allclose(one, many[0], rtol=1e-12)
    for got, weight in zip(weights[0], prior.forward, strict=True):
        assert got.shape == weight.shape
        assert got.dtype == np.float64


def test_relu_at_zero_has_slope_zero():
    """With all weights 0, every hidden unit is at 0, and only the last bias moves.

    D = 2, K = 2: one pair, prediction (0, 0), target (3, 4). The gradient of the
    prediction is 2 (0 - 3, 0 - 4) / D = (-3, -4), and that of the target is (3, 4).
    """
    prior = qm.MLPPrior.init(2, hidden_dim=3)
    still = qm.MLPPrior(
        *(qm.MLP(*(0 * w for w in mlp)) for mlp in (prior.forward,) * 2)
    )
    merged = np.array([[1.0, 2.0], [3.0, 4.0]])
    # Only the forward loss counts. The first token is not a target of it.
    slope, (forward, _) = qm.alignment_loss_vjp((1.0, 0.0, 0.0), merged, still)
    np.testing.assert_array_equal(forward.bias_out, [-3, -4])
    assert not any(w.any() for w in forward[:3])
    np.testing.assert_array_equal(slope, [[0, 0], [3, 4]])


def test_bad_input(rng):
    merged, prior = rng.standard_normal((2, 6, 4)), qm.MLPPrior.init(4)
    gradient = tuple(np.ones((3, 2)))
    with pytest.raises(TypeError, match="`prior` must be an MLPPrior, got Transformer"):
        qm.alignment_loss_vjp(
            gradient, merged, qm.TransformerPrior.init(4, num_heads=1)
        )
    for wrong in (gradient[:2], 1.0, None):
        with pytest.raises(TypeError, match="must be a tuple of three gradients"):
            qm.alignment_loss_vjp(wrong, merged, prior)
    with pytest.raises(ValueError, match=r"`gradient.total` must have shape \(B\)"):
        qm.alignment_loss_vjp((*gradient[:2], np.ones(3)), merged, prior)
    with pytest.raises(TypeError, match=r"`gradient.forward` must be float16"):
        qm.alignment_loss_vjp((np.ones(2, int), *gradient[1:]), merged, prior)
    with pytest.raises(ValueError, match="`merged` must have width D = 4"):
        qm.alignment_loss_vjp(gradient, merged[..., :3], prior)
