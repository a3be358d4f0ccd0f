"""The kernels of `reconstruction_error` and its gradient, run by an interpreter.

Token x_j of a sequence X is rebuilt from the merged token of its group.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close
from kernel_cases import (
    counted,
    counts_of,
    dtypes,
    labels_of,
    mask_of,
    masked,
    random,
    sizes,
    valid_of,
)
from vjp_cases import assert_gradient, vjp_sizes, wide

import qm_cupy as qm
from qm_cupy.stages.fidelity.reconstruction_error import (
    reconstruction_error_vjp_reference,
)

pytestmark = pytest.mark.usefixtures("kernels")


def errors_of(tokens, merged, labels):
    """Return the error of each sequence by the oracle."""
    sequences = zip(tokens, merged, labels, strict=True)
    return np.array([oracle.reconstruction_error(*sequence) for sequence in sequences])


@dtypes
@sizes
@masked
def test_reconstruction_error(dtype, num_tokens, masked):
    batch, dim, num_groups = 3, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    tokens = random((batch, num_tokens, dim), dtype)
    merged = random((batch, num_groups, dim), dtype, 9)
    # Sequence 1 is zeros. Its merged token 0 is not zero, so group 0 rebuilds it
    # wrongly (error inf). All other groups rebuild it exactly (error 0).
    tokens[1] = 0
    merged[1, 1:] = 0
    labels = labels_of(batch, num_tokens, num_groups)
    valid = valid_of(mask, labels.shape)
    for is_wrong in (True, False):
        labels[1] = 0 if is_wrong else num_groups - 1
        got = qm.reconstruction_error(tokens, merged, labels=labels, mask=mask)
        wanted = errors_of(tokens, merged, np.where(valid, labels, -1))
        assert_close(got, wanted, dtype)
    # Only sequences 0 and 2 have finite errors in all cases. The bound is (1 - 0.8)²,
    # or 0.04. The slices are not contiguous, so the launcher must copy them.
    assert_close(
        qm.fidelity_loss(tokens[::2], merged[::2], labels=labels[::2], gamma=0.8),
        np.maximum(errors_of(tokens[::2], merged[::2], labels[::2]) - 0.04, 0).mean(),
        dtype,
    )


@dtypes
@sizes
@counted
def test_most_similar_merged_token(dtype, num_tokens, counted):
    """Without labels, a token is rebuilt from the most similar merged token.

    Of equally similar merged tokens, it is the first one.
    """
    tokens = random((2, num_tokens, 37), dtype)
    merged = tokens[:, :: max(num_tokens // 7, 1)].copy()
    merged = np.concatenate([merged, merged[:, :1]], axis=1)
    # The last merged token is twice the first one: it is equally similar, but gives a
    # larger error.
    merged[:, -1] *= 2
    counts = counts_of(counted, 2, merged.shape[1])
    num_groups = None if counted == "all" else counts
    got = qm.reconstruction_error(tokens, merged, num_groups=num_groups)
    sequences = zip(tokens, merged, counts, strict=True)
    wanted = [oracle.reconstruction_error(x, y[:count]) for x, y, count in sequences]
    assert_close(got, wanted, dtype)


@dtypes
@vjp_sizes
@masked
def test_reconstruction_error_vjp(dtype, num_tokens, masked):
    batch, dim, num_groups = 4, 37, max(num_tokens // 4, 1)
    mask = mask_of(batch, num_tokens, masked)
    labels = labels_of(batch, num_tokens, num_groups)
    tokens = random((batch, num_tokens, dim), dtype)
    merged = random((batch, num_groups, dim), dtype, 9)
    tokens[1] = 0
    gradient = (
        random(batch, np.float32, 2) * num_tokens
    )  # the gradient is divided by ‖X‖²
    if mask is not None:
        tokens[~mask] = np.nan  # padding must not be read
    counts = np.full(batch, num_groups)
    inputs = [wide(gradient), wide(tokens), wide(merged), labels, counts, mask]
    wanted = reconstruction_error_vjp_reference(*inputs, -np.inf)
    got = qm.reconstruction_error_vjp(
        gradient, tokens, merged, labels=labels, mask=mask
    )
    for x, y in zip(got, wanted, strict=True):
        assert_gradient(x, y, dtype)
        assert not x[1].any()  # a sequence of zeros
