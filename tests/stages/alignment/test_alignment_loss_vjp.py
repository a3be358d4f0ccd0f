"""The gradient of the alignment loss: against differences, torch, and by hand.

Differences are central differences: (f(x + h) - f(x - h)) / 2h.
"""

import numpy as np
import pytest
from differences import assert_slope

import qm_cupy as qm


def prior_of(dim, hidden_dim, seed=3):
    """Return a prior with weights in float64."""
    prior = qm.MLPPrior.init(dim, hidden_dim=hidden_dim, seed=seed)
    networks = (
        qm.MLP(*(w.astype(np.float64) for w in network))
        for network in (prior.forward, prior.backward)
    )
    return qm.MLPPrior(*networks)


def loss_of(gradient, merged, prior, counts=None):
    """Return Σ gradient · loss. Its gradient is the result of `alignment_loss_vjp`."""
    losses = qm.alignment_loss(merged, prior, num_groups=counts)
    pairs = zip(gradient, losses, strict=True)
    return sum(np.sum(one * loss) for one, loss in pairs)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 18])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_gradient_against_differences(rng, num_groups, ragged):
    merged = rng.standard_normal((3, num_groups, 4))
    gradient = tuple(rng.standard_normal((3, 3)))
    counts = np.array([num_groups, (num_groups + 1) // 2, 1]) if ragged else None
    prior = prior_of(4, 6)  # small: each entry needs the loss twice
    token_gradient, weights = qm.alignment_loss_vjp(
        gradient, merged, prior, num_groups=counts
    )
    assert_slope(token_gradient, lambda x: loss_of(gradient, x, prior, counts), merged)
    networks = [prior.forward, prior.backward]
    for i, network in enumerate(networks):
        for name, weight in network._asdict().items():
            # Default arguments keep the i and the name of this iteration.
            def loss(w, i=i, name=name):
                changed = list(networks)
                changed[i] = changed[i]._replace(**{name: w})
                return loss_of(gradient, merged, qm.MLPPrior(*changed), counts)

            assert_slope(getattr(weights[i], name), loss, weight)
    if ragged:
        padding = np.arange(num_groups) >= counts[:, None]
        assert not token_gradient[padding].any()


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_gradient_against_torch(rng, precision):
    torch = pytest.importorskip("torch")
    merged = rng.standard_normal((2, 7, 4)).astype(precision)
    prior = qm.MLPPrior.init(4, hidden_dim=6)
    x = torch.tensor(merged, requires_grad=True)
    networks = [
        [torch.tensor(w.astype(precision), requires_grad=True) for w in network]
        for network in (prior.forward, prior.backward)
    ]

    def mean_error(x, network):
        weight_in, bias_in, weight_out, bias_out = network
        count = torch.arange(1, 8, dtype=x.dtype)[:, None]  # (K, 1)
        hidden = torch.relu(x.cumsum(1) / count @ weight_in.T + bias_in)
        predicted = hidden @ weight_out.T + bias_out
        return (predicted[:, :-1] - x[:, 1:]).square().mean((1, 2))

    # The backward network reads the flipped tokens in the same way.
    forward, backward = mean_error(x, networks[0]), mean_error(x.flip(1), networks[1])
    (forward + backward).sum().backward()
    ones, zeros = np.ones(2, precision), np.zeros(2, precision)
    token_gradient, weights = qm.alignment_loss_vjp((zeros, zeros, ones), merged, prior)
    assert token_gradient.dtype == precision
    np.testing.assert_allclose(token_gradient, x.grad, rtol=1e-5, atol=1e-5)
    for mlp, network in zip(weights, networks, strict=True):
        for got, wanted in zip(mlp, network, strict=True):
            assert got.dtype == precision
            np.testing.assert_allclose(got, wanted.grad, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_total_is_the_sum_of_both_directions(rng):
    merged, prior = rng.standard_normal((2, 6, 4)), qm.MLPPrior.init(4)
    ones, zeros = np.ones(2), np.zeros(2)
    of_total = qm.alignment_loss_vjp((zeros, zeros, ones), merged, prior)
    of_both = qm.alignment_loss_vjp((ones, ones, zeros), merged, prior)
    of_forward = qm.alignment_loss_vjp(
        qm.AlignmentLoss(ones, zeros, zeros), merged, prior
    )
    np.testing.assert_array_equal(of_total[0], of_both[0])
    for x, y in zip(of_total[1][0], of_forward[1][0], strict=True):
        np.testing.assert_array_equal(x, y)
    # The forward loss does not depend on the backward network.
    assert not any(w.any() for w in of_forward[1][1])


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
    merged[1, 3:] = np.nan  # 0 · NaN is NaN: padding must not be read
    with qm.check_finite(False):  # otherwise NaN raises an error
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
    batch_gradient, _ = qm.alignment_loss_vjp(tuple(np.ones((3, 2))), merged, prior)
    token_gradient, weights = qm.alignment_loss_vjp(
        (1, 1.0, np.float32(1)), merged[0], prior
    )
    np.testing.assert_allclose(token_gradient, batch_gradient[0], rtol=1e-12)
    for got, weight in zip(weights[0], prior.forward, strict=True):
        assert got.shape == weight.shape
        assert got.dtype == np.float64


def test_relu_has_derivative_zero_at_zero():
    """If all weights are 0, every hidden unit is 0: only b₂ has a gradient.

    D = 2, K = 2: one pair, prediction (0, 0), target (3, 4). The gradient of the
    prediction is 2 (0 - 3, 0 - 4) / D = (-3, -4), and that of the target is (3, 4).
    """
    prior = qm.MLPPrior.init(2, hidden_dim=3)
    zero_prior = qm.MLPPrior(
        *(qm.MLP(*(0 * w for w in mlp)) for mlp in (prior.forward,) * 2)
    )
    merged = np.array([[1.0, 2.0], [3.0, 4.0]])
    # The gradient is that of the forward loss, in which token 0 is not a target.
    token_gradient, (forward, _) = qm.alignment_loss_vjp(
        (1.0, 0.0, 0.0), merged, zero_prior
    )
    np.testing.assert_array_equal(forward.bias_out, [-3, -4])
    assert not any(w.any() for w in forward[:3])
    np.testing.assert_array_equal(token_gradient, [[0, 0], [3, 4]])


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
