"""The kernels of `nearest`, run by an interpreter on the CPU.

Each token joins its most similar anchor. A root is the position of this anchor.
"""

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
    protected = fill(protect, valid.shape, False) & valid
    tokens = random((batch, num_tokens, dim), dtype)
    # Every seventh token is equal: there are ties, and anchors with an equal token.
    tokens[:, ::7] = tokens[:, :1]
    tokens[:, 3::9] = 0  # similarity 0 with every anchor
    rng = np.random.default_rng(2)
    counts = counts_of(valid, protected, 0.3)
    # Anchors: all protected tokens and some others, in random order, padded with -1.
    anchors = np.full((batch, max(counts.max(), 1)), -1)
    for b in range(batch):
        free = rng.permutation(np.flatnonzero(valid[b] & ~protected[b]))
        selected = np.concatenate((np.flatnonzero(protected[b]), free))[: counts[b]]
        anchors[b, : counts[b]] = rng.permutation(selected)
    got = nearest_groups_cuda(tokens, anchors, None, mask, protect)
    assert got.dtype == np.int32
    for b in range(batch):
        x, selected = unit(tokens[b]), np.sort(anchors[b, : counts[b]])
        free = selected[~protected[b, selected]]
        for i in range(num_tokens):
            if not valid[b, i]:
                assert got[b, i] == -1
            elif i in selected:
                assert got[b, i] == i
            else:
                # The root is a free anchor. Its similarity is the highest, to rounding.
                similarity = x[free] @ x[i]
                assert got[b, i] in free
                similarity_of_root = similarity[np.searchsorted(free, got[b, i])]
                assert similarity_of_root >= similarity.max() - 1e-6
                # A zero token is equally similar to all anchors: the earliest one wins.
                if (tokens[b, i] == 0).all():
                    assert got[b, i] == free[0]
                # Of equal anchors, the first one wins.
                equal_anchors = free[(free % 7 == 0) & x[free].any(-1)]
                if i % 7 == 0 and x[i].any() and equal_anchors.size:
                    assert got[b, i] == equal_anchors[0]
    anchor_counts = counts.astype(np.int32)
    # `counts` instead of padding with -1 gives the same roots.
    by_counts = nearest_groups_cuda(
        tokens, np.maximum(anchors, 0), anchor_counts, mask, protect
    )
    np.testing.assert_array_equal(by_counts, got)
    sequence_masks = (None if m is None else m[0] for m in (mask, protect))
    sequence_masks = nearest_groups_cuda(tokens[0], anchors[0], None, *sequence_masks)
    np.testing.assert_array_equal(sequence_masks, got[0])


@dtypes
@sizes
@masked
def test_default_anchors(dtype, num_tokens, masked):
    mask, protect = masks_of(3, num_tokens, masked)
    valid = fill(mask, (3, num_tokens), True)
    protected = fill(protect, valid.shape, False) & valid
    tokens = random((3, num_tokens, 6), dtype)
    tokens[:, 1::3] = tokens[:, :1]  # equal norms: the earlier token is selected
    counts = counts_of(valid, protected, 0.4)
    got = top_norm_anchors_cuda(tokens, *kernel_counts(counts), mask, protect)
    norms = np.linalg.norm(tokens.astype(np.float64), axis=-1)
    norms[:, 1::3] = norms[:, :1]  # exactly equal, without rounding
    norms = np.where(protected, np.inf, np.where(valid, norms, -np.inf))
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
    # If two similarities are equal to rounding, both anchors are right.
    similarity_of_result = np.take_along_axis(
        wanted, np.maximum(got, 0)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(
        similarity_of_result[mask], best[mask], rtol=0, atol=tolerance
    )
    # Without any anchor, all tokens get -1.
    no_anchors = np.full_like(norms, -1)
    got, similarity = nearest_anchors_cuda(
        tokens, anchors, None, None, no_anchors, similarity=True
    )
    assert (got == -1).all()
    assert (similarity == -np.inf).all()


@dtypes
def test_a_nan_token_has_the_first_anchor(dtype):
    tokens, anchors = random((1, 33, 9), dtype), random((1, 4, 9), dtype, 1)
    wanted, _ = nearest_anchors_cuda(tokens, anchors)
    # Without this rule, a NaN token would have no group, and not every token a label.
    tokens[0, 5], wanted[0, 5] = np.nan, 0
    got, _ = nearest_anchors_cuda(tokens, anchors)
    np.testing.assert_array_equal(got, wanted)
