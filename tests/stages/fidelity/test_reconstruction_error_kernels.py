"""The kernels of `reconstruction_error` and its gradient, run by an interpreter."""

import numpy as np
import oracle
import pytest
from conftest import assert_close
from kernel_cases import (
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


def error_of(tokens, merged, labels):
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
    # A sequence of zeros: group 0 rebuilds it wrongly (error inf), all other groups
    # exactly (error 0).
    tokens[1] = 0
    merged[1, 1:] = 0
    labels = labels_of(batch, num_tokens, num_groups)
    valid = valid_of(mask, labels.shape)
    for lost in (True, False):
        labels[1] = 0 if lost else num_groups - 1
        got = qm.reconstruction_error(tokens, merged, labels=labels, mask=mask)
        wanted = error_of(tokens, merged, np.where(valid, labels, -1))
        assert_close(got, wanted, dtype)
    # Sequences 0 and 2 alone have finite errors; (1 - 0.8)² = 0.04. The slices are not
    # contiguous, so the launcher must copy them.
    assert_close(
        qm.fidelity_loss(tokens[::2], merged[::2], labels=labels[::2], gamma=0.8),
        np.maximum(error_of(tokens[::2], merged[::2], labels[::2]) - 0.04, 0).mean(),
        dtype,
    )


@dtypes
@sizes
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_most_similar_merged_token(dtype, num_tokens, ragged):
    """Without labels, the most similar merged token counts; in a tie, the first one."""
    tokens = random((2, num_tokens, 37), dtype)
    merged = tokens[:, :: max(num_tokens // 7, 1)].copy()
    merged = np.concatenate([merged, merged[:, :1]], axis=1)
    # The last is twice the first: as similar, but with a larger error. Taking it
    # instead of the first would show.
    merged[:, -1] *= 2
    top = merged.shape[1]
    counts = np.array([top, max(top // 2, 1)]) if ragged else np.array([top, top])
    got = qm.reconstruction_error(tokens, merged, num_groups=counts if ragged else None)
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
    gradient = random(batch, np.float32, 2) * num_tokens  # ‖X‖² grows with N
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
