"""The kernels of the gradient of `fidelity_loss`, interpreted."""

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
    """Of three sequences, one loses nothing and one less than the bound."""
    tokens, merged = random((3, 33, 17), dtype), random((3, 9, 17), dtype, 9)
    counts = np.array([9, 5, 9]) if ragged else np.full(3, 9)
    labels = labels_of(3, 33, 5)
    for b, share in ((0, 0), (1, 0.5)):
        rebuilt = wide(merged)[b, np.maximum(labels[b], 0)]
        tokens[b] = rebuilt + share * wide(tokens)[b]
    options = {"num_groups": counts if ragged else None, "gamma": 0.3}
    for given in (labels, None):
        got = qm.fidelity_loss_vjp(99.0, tokens, merged, labels=given, **options)
        arrays = np.full(3, 33.0), wide(tokens), wide(merged), given, counts, None
        wanted = reconstruction_error_vjp_reference(*arrays, 0.7**2)
        for x, y in zip(got, wanted, strict=True):
            assert_gradient(x, y, dtype)
        if given is not None:
            assert [x.any() for x in got[0]] == [False, False, True]
