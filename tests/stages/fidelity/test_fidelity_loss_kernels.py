"""The kernels of the gradient of `fidelity_loss`, run by an interpreter on the CPU."""

import numpy as np
import pytest
from kernel_cases import counted, counts_of, dtypes, labels_of, random
from vjp_cases import assert_gradient, wide

import qm_cupy as qm
from qm_cupy.stages.fidelity.reconstruction_error import (
    reconstruction_error_vjp_reference,
)

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@counted
def test_fidelity_loss_vjp(dtype, counted):
    """The error is 0 in sequence 0, below the bound in 1, and above it in 2.

    γ is 0.3, so the bound is (1 - 0.3)² = 0.49.
    """
    tokens, merged = random((3, 33, 17), dtype), random((3, 9, 17), dtype, 9)
    counts = counts_of(counted, 3, 9)
    labels = labels_of(3, 33, 5)
    if counted == "ragged":
        counts[2] = 9  # sequence 2 has labels up to 4
    # Tokens are the rebuilt tokens plus noise. With a scale of 0.5, the error stays
    # below 0.49.
    for b, scale in ((0, 0), (1, 0.5)):
        rebuilt = wide(merged)[b, np.maximum(labels[b], 0)]
        tokens[b] = rebuilt + scale * wide(tokens)[b]
    options = {"num_groups": None if counted == "all" else counts, "gamma": 0.3}
    for used_labels in (labels, None):  # None: by similarity
        got = qm.fidelity_loss_vjp(99.0, tokens, merged, labels=used_labels, **options)
        # The loss is the mean of three errors, so a gradient of 99 gives dL/de_b = 33
        # for each error e_b.
        arrays = np.full(3, 33.0), wide(tokens), wide(merged), used_labels, counts, None
        wanted = reconstruction_error_vjp_reference(*arrays, 0.7**2)
        for x, y in zip(got, wanted, strict=True):
            assert_gradient(x, y, dtype)
        if used_labels is not None:
            assert [x.any() for x in got[0]] == [False, False, True]
