"""The kernels of `nearest`, interpreted."""

import numpy as np
import pytest
from grouping_cases import counts_of, fill, kernel_counts, masks_of, sizes
from kernel_cases import dtypes, masked, random
from oracle_arrays import unit
from seam import cuda

from qm_cupy.stages.clustering.nearest import (
    nearest_anchors_cuda,
    nearest_groups_cuda,
    top_norm_anchors_cuda,
)

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@sizes
@masked
def test_nearest_groups(dtype, num_tokens, masked):
    batch, dim = 3, 37
    mask, protect = masks_of(batch, num_tokens, masked)
    valid = fill(mask, (batch, num_tokens), True)
    alone = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    tokens[:, ::7] = tokens[
        :, :1
    ]  # equal tokens: ties, and anchors with an equal token
    tokens[:, 3::9] = 0  # similarity 0 with every anchor
    rng = np.random.default_rng(2)
    counts = counts_of(valid, alone, 0.3)
    # Anchors in random order: all protected tokens, then others, padded with -1.
    anchors = np.full((batch, max(counts.max(), 1)), -1)
    for b in range(batch):
        free = rng.permutation(np.flatnonzero(valid[b] & ~alone[b]))
        selected = np.concatenate((np.flatnonzero(alone[b]), free))[: counts[b]]
        anchors[b, : counts[b]] = rng.permutation(selected)
    got = nearest_groups_cuda(tokens, anchors, None, mask, protect)
    assert got.dtype == np.int32
    for b in range(batch):
        x, selected = unit(tokens[b]), np.sort(anchors[b, : counts[b]])
        free = selected[~alone[b, selected]]
        for i in range(num_tokens):
            if not valid[b, i]:
                assert got[b, i] == -1
            elif i in selected:
                assert got[b, i] == i
            else:
                # Within rounding of the highest similarity, and never protected.
                similarity = x[free] @ x[i]
                assert got[b, i] in free
                at = similarity[np.searchsorted(free, got[b, i])]
                assert at >= similarity.max() - 1e-6
                if (tokens[b, i] == 0).all():  # equally similar to all: the earliest
                    assert got[b, i] == free[0]
                # Of equal anchors the first one.
                twins = free[(free % 7 == 0) & x[free].any(-1)]
                if i % 7 == 0 and x[i].any() and twins.size:
                    assert got[b, i] == twins[0]
    anchor_counts = counts.astype(np.int32)
    # `counts` instead of padding with -1 gives the same roots.
    again = nearest_groups_cuda(
        tokens, np.maximum(anchors, 0), anchor_counts, mask, protect
    )
    np.testing.assert_array_equal(again, got)
    one = (None if m is None else m[0] for m in (mask, protect))
    one = nearest_groups_cuda(tokens[0], anchors[0], None, *one)
    np.testing.assert_array_equal(one, got[0])


@dtypes
@sizes
@masked
def test_default_anchors(dtype, num_tokens, masked):
    mask, protect = masks_of(3, num_tokens, masked)
    valid = fill(mask, (3, num_tokens), True)
    alone = fill(protect, valid.shape, False) & valid
    tokens = random((3, num_tokens, 6), dtype)
    tokens[:, 1::3] = tokens[:, :1]  # equal norms: the earlier token is selected
    counts = counts_of(valid, alone, 0.4)
    got = top_norm_anchors_cuda(tokens, *kernel_counts(counts), mask, protect)
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    norms[:, 1::3] = norms[:, :1]  # exactly equal, whatever the rounding
    norms = np.where(alone, np.inf, np.where(valid, norms, -np.inf))
    for b in range(3):
        wanted = np.sort(np.argsort(-norms[b], stable=True)[: counts[b]])
        np.testing.assert_array_equal(got[b, : counts[b]], wanted)
        assert (got[b, counts[b] :] == -1).all()


@dtypes
@sizes
def test_similarity_with_the_nearest_anchor(dtype, num_tokens):
    tokens, anchors = random((2, num_tokens, 37), dtype), random((2, 129, 37), dtype, 1)
    tokens[:, num_tokens // 2], anchors[:, 4] = 0, 0
    mask, _ = masks_of(2, num_tokens)
    counts = np.array([129, 70], np.int32)
    norms = np.linalg.norm(anchors.astype(np.float64), axis=-1)
    norms = norms.astype(cuda.accumulation_dtype(dtype))
    norms[:, ::3] = -1  # these entries are not anchors
    got, similarity = nearest_anchors_cuda(
        tokens, anchors, counts, mask, norms, similarity=True
    )
    wanted = np.matmul(unit(tokens), np.swapaxes(unit(anchors), -1, -2))
    wanted[norms[:, None] * np.ones(wanted.shape) < 0] = -np.inf
    wanted[1, :, 70:] = -np.inf
    tolerance = 1e-12 if dtype == np.float64 else 2e-6
    best = np.where(mask, wanted.max(-1), -np.inf)
    np.testing.assert_allclose(similarity, best, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(got == -1, ~mask)
    # Where similarities are equal to rounding, either anchor is right.
    at = np.take_along_axis(wanted, np.maximum(got, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(at[mask], best[mask], rtol=0, atol=tolerance)
    # Without any anchor, all tokens get -1.
    none = np.full_like(norms, -1)
    got, similarity = nearest_anchors_cuda(
        tokens, anchors, None, None, none, similarity=True
    )
    assert (got == -1).all()
    assert (similarity == -np.inf).all()


@dtypes
def test_a_token_that_is_not_a_number_has_the_first_anchor(dtype):
    tokens, anchors = random((1, 33, 9), dtype), random((1, 4, 9), dtype, 1)
    wanted, _ = nearest_anchors_cuda(tokens, anchors)
    # A NaN token would otherwise have no group, and K groups would not hold all tokens.
    tokens[0, 5], wanted[0, 5] = np.nan, 0
    got, _ = nearest_anchors_cuda(tokens, anchors)
    np.testing.assert_array_equal(got, wanted)
