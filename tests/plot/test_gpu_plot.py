"""Arrays on a GPU give the same pictures as NumPy's; this needs CuPy and a GPU."""

import numpy as np
import pytest
from artists import CALLS, closed, pixels  # noqa: F401
from gpu_at_hand import cupy
from gpu_parity import marks

from qm_cupy import plot

pytestmark = marks


@pytest.mark.parametrize("name", plot.__all__)
def test_arrays_on_a_gpu(name):
    function = getattr(plot, name)
    arrays, options = CALLS[name]
    # Pixels, because this compares two pictures of one matplotlib.
    wanted = pixels(function(*arrays, **options).figure)
    got = pixels(function(*map(cupy.asarray, arrays), **options).figure)
    np.testing.assert_array_equal(got, wanted)
