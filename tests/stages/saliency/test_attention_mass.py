"""`attention_mass` and its gradient: the oracle, finite differences, dtypes, checks."""

import numpy as np
import oracle
import pytest
from conftest import assert_close
from differences import assert_slope

import qm_cupy as qm

SHAPES = [(7,), (2, 7), (2, 3, 7), (3, 2, 4, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES)


@shapes
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_oracle(rng, dtype, shape, causal):
    received, entropy = rng.random((2, *shape)).astype(dtype)
    got = qm.attention_mass(received, 3 * entropy, causal=causal)
    layers = (received, 3 * entropy)
    if len(shape) == 1:
        wanted = oracle.attention_mass(*(x[None, None] for x in layers), causal)
    elif len(shape) == 2:
        wanted = [
            oracle.attention_mass(*(x[None, b : b + 1] for x in layers), causal)
            for b in range(2)
        ]
    else:
        # (L, heads, N) of each sequence
        heads = [x[None] if len(shape) == 3 else x for x in layers]
        wanted = [
            oracle.attention_mass(*(x[:, b] for x in heads), causal) for b in range(2)
        ]
    assert got.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_close(got, wanted, dtype)


def test_by_hand():
    # Token 0 attends to one token, and token 1 to two tokens equally.
    attention = np.array([[1.0, 0.0], [0.5, 0.5]])
    mass = qm.attention_mass(
        qm.attention_received(attention), qm.attention_entropy(attention)
    )
    assert_close(mass, [0.75, 0.25 / 2])


@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_that_says_nothing_gives_equal_masses(masked):
    """Each token attends to all tokens up to itself equally."""
    mask = np.array([True, False, True, True, True, False, True])
    valid = mask if masked else np.ones(7, bool)
    attention = np.tril(np.ones((7, 7))) * valid * valid[:, None]
    attention /= np.maximum(attention.sum(-1, keepdims=True), 1)
    options = {"mask": valid}
    received = np.array([0.5] * 7) * valid
    entropy = qm.attention_entropy(attention, **options)
    mass = qm.attention_mass(received, entropy, causal=True, **options)
    assert_close(mass[valid], np.full(valid.sum(), 0.5))
    assert not mass[~valid].any()


def test_a_token_has_the_same_bits_in_every_batch(rng):
    received, entropy = rng.random((2, 3, 5, 4, 33)).astype(np.float32)
    whole = qm.attention_mass(received, entropy)
    for b in range(5):
        alone = qm.attention_mass(
            received[:, b : b + 1, :, :9], entropy[:, b, None, :, :9]
        )
        np.testing.assert_array_equal(alone[0], whole[b, :9])


def test_mixed_dtypes(rng):
    received, entropy = rng.random((2, 2, 7))
    got = qm.attention_mass(received.astype(np.float16), entropy)
    assert got.dtype == np.float64
    r, h = qm.attention_mass_vjp(
        np.ones((2, 7), np.float16), received.astype(np.float32), entropy
    )
    assert (r.dtype, h.dtype) == (np.float32, np.float64)


@shapes
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_matches_finite_differences(rng, shape, causal):
    received, entropy = rng.random((2, *shape))
    per_token = shape[-1:] if len(shape) == 1 else (2, shape[-1])
    options = {"causal": causal, "mask": rng.random(per_token) < 0.7}
    gradient = rng.standard_normal(per_token)
    got = qm.attention_mass_vjp(gradient, received, entropy, **options)

    def loss(received, entropy):
        return (gradient * qm.attention_mass(received, entropy, **options)).sum()

    assert_slope(got[0], lambda r: loss(r, entropy), received)
    assert_slope(got[1], lambda h: loss(received, h), entropy)


def test_wrong_arguments_are_refused(rng):
    received, entropy = rng.random((2, 2, 7))
    with pytest.raises(ValueError, match="`entropy` must have shape"):
        qm.attention_mass(received, entropy[0])
    with pytest.raises(ValueError, match="`received` must be ≥ 0"):
        qm.attention_mass(-received, entropy)
    with pytest.raises(ValueError, match="`entropy` must be ≥ 0"):
        qm.attention_mass(received, -entropy)
    with pytest.raises(TypeError, match="`causal` must be True or False"):
        qm.attention_mass(received, entropy, causal=1)
    with pytest.raises(ValueError, match="`mask` must have shape"):
        qm.attention_mass(received, entropy, mask=np.ones(6, bool))
    with pytest.raises(ValueError, match="`entropy` must be finite"):
        qm.attention_mass(received, entropy + np.inf)
    with pytest.raises(TypeError, match="`received` must be float16"):
        qm.attention_mass(received.astype(int), entropy)
    with pytest.raises(ValueError, match="`gradient` must have shape"):
        qm.attention_mass_vjp(entropy[0], received, entropy)
