"""The kernels of `labels`, run by an interpreter on the CPU."""

import numpy as np
import pytest
from grouping_cases import labels_of, long_sizes, orders

from qm_cupy.stages.clustering.labels import number_groups_cuda

pytestmark = pytest.mark.usefixtures("kernels")


@long_sizes
@orders
def test_number_groups(num_tokens, order):
    rng = np.random.default_rng(num_tokens)
    roots = rng.integers(-1, 2 * num_tokens, (4, num_tokens)).astype(np.int32)
    roots[1] //= 7  # larger groups
    roots[2] = 2 * num_tokens - 1  # one group, with the largest possible root
    # Roots out of range are padding: a kernel must not use them as an index.
    roots[3, ::2] = rng.choice([-7, 2 * num_tokens, 2**31 - 1, -(2**31)])
    got = number_groups_cuda(roots, order)
    assert got.dtype == np.int32
    valid = (roots >= 0) & (roots < 2 * num_tokens)
    for b in range(4):
        wanted = labels_of(roots[b], valid[b], order)
        np.testing.assert_array_equal(got[b], wanted)
    # Without the batch axis the result is the same.
    np.testing.assert_array_equal(number_groups_cuda(roots[1], order), got[1])
