"""Saliency by the oracle, and finite differences, for the tests of this folder.

The oracle (oracle.py) computes one sequence without padding, with plain float64 loops.
A vector–Jacobian product (`vjp`) is the gradient of the loss Σ gradient · result with
respect to the inputs of a function.
"""

import numpy as np
import oracle


def saliency_of(entropy, valid, salient):
    """Return the saliency (B, N) of entropies (L, B, H, N), where `valid` (B, N)."""
    out = np.zeros(valid.shape)  # padding has saliency 0
    for b, row in enumerate(valid):
        if row.any():  # the oracle needs at least one token
            layers = entropy[:, b].astype(np.float64).mean(1)[:, row]  # (L, tokens)
            out[b, row] = oracle.saliency(layers, salient)
    return out


def as_tuple(value):
    """Return the gradients of a vjp as a tuple, also if there is only one."""
    several = value if isinstance(value, tuple) else (value,)
    # A function with two possible sources returns None for the one that is absent.
    return tuple(x for x in several if x is not None)


def random_gradient(rng, function, inputs, options):
    """Return a random gradient of the shape of a function's result."""
    return rng.standard_normal(function(**inputs, **options).shape)


def differences(function, name, inputs, options, gradient, step=1e-4):
    """Return ∂ Σ(gradient · result) / ∂ inputs[name] by central differences."""
    x = inputs[name]
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):

        def loss(num_steps, index=index):
            """Return the loss after a change of one entry of x by some steps."""
            moved = x.copy()
            moved[index] += num_steps * step
            result = function(**{**inputs, name: moved}, **options)
            return np.sum(gradient * result)

        # (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h for f = `loss` and h = `step`. The
        # error is of order h⁴.
        near, far = loss(1) - loss(-1), loss(2) - loss(-2)
        out[index] = (8 * near - far) / (12 * step)
    return out


def check_differences(rng, function, vjp, inputs, options):
    """Compare the gradients of a vjp with differences, for every input."""
    gradient = random_gradient(rng, function, inputs, options)
    gradients = as_tuple(vjp(gradient, **inputs, **options))
    assert len(gradients) == len(inputs)
    for got, name in zip(gradients, inputs, strict=True):
        wanted = differences(function, name, inputs, options, gradient)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * scale)
