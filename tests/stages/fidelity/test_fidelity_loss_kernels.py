"""The kernels of the gradient of `fidelity_loss`, run by an interpreter."""

import numpy as np
import pytest
from kernel_cases import dtypes, labels_of, random
from vjp_cases import assert_gradient, ragged, wide

import qm_cupy as qm
from qm_cupy.stages.fidelity.reconstruction_error import (
    reconstruction_error_vjp_reference,
)

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@ragged
def test_fidelity_loss_vjp(dtype, ragged):
    """Sequence 0 loses nothing, sequence 1 less than the bound, sequence 2 more."""
    tokens, merged = random((3, 33, 17), dtype), random((3, 9, 17), dtype, 9)
    counts = np.array([9, 5, 9]) if ragged else np.full(3, 9)
    labels = labels_of(3, 33, 5)
    # Noise of scale 0.5 on top of the rebuilt tokens stays below the bound of 0.49.
    for b, scale in ((0, 0), (1, 0.5)):
        rebuilt = wide(merged)[b, np.maximum(labels[b], 0)]
        tokens[b] = rebuilt + scale * wide(tokens)[b]
    options = {"num_groups": counts if ragged else None, "gamma": 0.3}
    for known in (labels, None):  # None: the most similar merged token
        got = qm.fidelity_loss_vjp(99.0, tokens, merged, labels=known, **options)
        # dL/de_b = 99 / 3 = 33, and (1 - 0.3)² is the bound.
        arrays = np.full(3, 33.0), wide(tokens), wide(merged), known, counts, None
        wanted = reconstruction_error_vjp_reference(*arrays, 0.7**2)
        for x, y in zip(got, wanted, strict=True):
            assert_gradient(x, y, dtype)
        if known is not None:
            assert [x.any() for x in got[0]] == [False, False, True]
