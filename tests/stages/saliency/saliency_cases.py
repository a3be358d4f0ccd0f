"""What the tests of this folder share: softmax, saliency, gradients by differences."""

import numpy as np


def saliency_of(entropy, valid, salient):
    """Return saliency (B, N) of entropy (L, B, H, N) and tokens (B, N)."""
    h = entropy.astype(np.float64).mean(2)
    low = np.where(valid, h, np.inf).min(-1, keepdims=True)
    width = np.where(valid, h, -np.inf).max(-1, keepdims=True) - low
    low, width = np.where(width > 0, low, 0), np.where(width > 0, width, np.inf)
    mean = ((h - low) / width).mean(0)
    return np.where(valid, mean if salient == "high" else 1 - mean, 0)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def results(found):
    return found if isinstance(found, tuple) else (found,)


def gradient_of(rng, function, inputs, options):
    return rng.standard_normal(function(**inputs, **options).shape)


def differences(function, name, inputs, options, gradient, step=1e-4):
    """Return the gradient of sum(gradient · result) by differences of fourth order."""
    x = inputs[name]
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):

        def loss(times, index=index):
            moved = x.copy()
            moved[index] += times * step
            result = function(**{**inputs, name: moved}, **options)
            return np.sum(gradient * result)

        near, far = loss(1) - loss(-1), loss(2) - loss(-2)
        out[index] = (8 * near - far) / (12 * step)
    return out


def check_differences(rng, function, vjp, inputs, options):
    gradient = gradient_of(rng, function, inputs, options)
    found = results(vjp(gradient, **inputs, **options))
    assert len(found) == len(inputs)
    for got, name in zip(found, inputs, strict=True):
        wanted = differences(function, name, inputs, options, gradient)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * scale)
