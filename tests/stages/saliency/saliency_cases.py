"""Saliency by the oracle, and finite differences, for the tests of this folder."""

import numpy as np
import oracle


def saliency_of(entropy, valid, salient):
    """Return saliency (B, N) of entropy (L, B, H, N) and tokens (B, N)."""
    out = np.zeros(valid.shape)  # padding has saliency 0
    for b, tokens in enumerate(valid):
        if tokens.any():
            layers = entropy[:, b].astype(np.float64).mean(1)[:, tokens]
            out[b, tokens] = oracle.saliency(layers, salient)
    return out


def results(value):
    return value if isinstance(value, tuple) else (value,)


def gradient_of(rng, function, inputs, options):
    return rng.standard_normal(function(**inputs, **options).shape)


def differences(function, name, inputs, options, gradient, step=1e-4):
    """Return ∂ sum(gradient · result) / ∂ inputs[name] by central differences."""
    x = inputs[name]
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):

        def loss(times, index=index):
            moved = x.copy()
            moved[index] += times * step
            result = function(**{**inputs, name: moved}, **options)
            return np.sum(gradient * result)

        # (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, with an error of order h⁴.
        near, far = loss(1) - loss(-1), loss(2) - loss(-2)
        out[index] = (8 * near - far) / (12 * step)
    return out


def check_differences(rng, function, vjp, inputs, options):
    gradient = gradient_of(rng, function, inputs, options)
    slopes = results(vjp(gradient, **inputs, **options))
    assert len(slopes) == len(inputs)
    for got, name in zip(slopes, inputs, strict=True):
        wanted = differences(function, name, inputs, options, gradient)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * scale)
