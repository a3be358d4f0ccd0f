"""The gradient of a function by central differences."""

import numpy as np


def differences(function, x, step=1e-5):
    """Return the gradient of a scalar function at x, in float64.

    Central differences: (f(x + h) - f(x - h)) / 2h has an error of order h^2.
    """
    slope = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        slope[index] = (function(above) - function(below)) / (2 * step)
    return slope


def assert_slope(got, function, x, step=1e-5):
    """Compare a gradient with differences, to 1e-6 of its largest entry."""
    assert got.dtype == x.dtype == np.float64
    assert got.flags.c_contiguous
    wanted = differences(function, x, step)
    # The floor of 1e-3 keeps a tolerance for a gradient that is 0 everywhere.
    room = 1e-6 * max(abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=room)
