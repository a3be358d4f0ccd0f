"""The kernels of `select_tokens`: a mask of the K highest scores, and their positions.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). With `@optimized`, it runs a test with optimized kernels only.
The expected positions come from a stable sort (oracle_arrays.py).
"""

import ml_dtypes
import numpy as np
import ptx
import pytest
from kernel_cases import SIZES, dtypes, mask_of, masked, optimized, random, valid_of
from oracle_arrays import top_k
from seam import cuda

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@pytest.mark.parametrize("num_tokens", [*SIZES, 1000])
@masked
def test_select_tokens(dtype, num_tokens, masked):
    batch, num_groups = 3, max(num_tokens // 3, 1)
    mask = mask_of(batch, num_tokens, masked)
    scores = random((batch, num_tokens), np.float32, scale=2)
    scores = np.copysign(np.round(scores), scores).astype(dtype)  # ties; -0 equals 0
    scores[0, ::5] = -60000  # very low, but above the -inf of padding
    per_sequence = np.array([num_groups, max(num_groups // 2, 1), 1])
    for counts in (num_groups, per_sequence):
        got = qm.select_tokens(scores, counts, mask=mask)
        hot = qm.gumbel_softmax(scores, seed=None, hard=counts, mask=mask)
        for b in range(batch):
            valid = valid_of(mask, scores.shape)[b]
            count = np.broadcast_to(counts, batch)[b]
            # A mask may leave fewer than K tokens; then the rest of the row is -1.
            wanted = np.full(num_groups, -1)
            top_indices = top_k(scores[b], valid, count)
            wanted[: len(top_indices)] = top_indices
            np.testing.assert_array_equal(got[b], wanted)
            np.testing.assert_array_equal(np.flatnonzero(hot[b]), top_indices)


@dtypes
def test_select_tokens_orders_subnormal_scores(dtype):
    """They have the order of NumPy, although float32 on a GPU flushes them to 0."""
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    scores = np.random.default_rng(8).integers(-60, 61, (2, 300)) * tiny
    scores[1, :150] = np.copysign(0, scores[1, :150])  # -0 and 0 are equal
    scores = scores.astype(dtype)
    for count in (1, 40, 170, 299):
        got = qm.select_tokens(scores, count)
        hot = qm.gumbel_softmax(scores, seed=None, hard=count)
        for b in range(2):
            top_indices = top_k(scores[b], np.ones(300, np.bool_), count)
            np.testing.assert_array_equal(got[b], top_indices)
            np.testing.assert_array_equal(np.flatnonzero(hot[b]), top_indices)


def select_with_optimized_kernels(scores, counts, num_groups):
    """Launch both kernels; return the K-hot mask (B, N) and the positions (B, K).

    The public function refuses scores that are not finite; this function does not.
    """
    batch, num_tokens = scores.shape
    selected = ptx.empty(scores.shape, np.bool_)
    args = (scores, counts, batch, num_tokens, num_groups, selected)
    options = {"blocks": batch, "kernels": "optimized"}
    cuda.launch("select_tokens", "top_tokens", scores.dtype, args, **options)
    positions = ptx.empty((batch, num_groups), np.int32)
    args = (selected, batch, num_tokens, num_groups, positions)
    cuda.launch("select_tokens", "select_tokens", np.float32, args, **options)
    return selected, positions


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@optimized
def test_radix_selection(dtype):
    """The selection is correct for random bits, ties, tiny scores and padding."""
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**64, 20_000, dtype=np.uint64).view(dtype)[:20_000]
    tiny = np.finfo(dtype).smallest_subnormal
    # Rows: random bits, subnormal numbers, equal scores, and padding (-inf) for about
    # half of the tokens.
    rows = [
        np.where(np.isfinite(words), words, 0),
        rng.integers(-2, 3, 20_000) * tiny,
        np.full(20_000, 0.25, dtype),
    ]
    rows.append(np.where(rng.random(20_000) < 0.5, -np.inf, rng.random(20_000)))
    scores = np.stack(rows).astype(dtype)
    valid = np.isfinite(scores)
    # The selection compares 8 bits (256 values) at a time, so K is around 256 and at
    # some multiples of it.
    for counts in ([1, 255, 16_384, 20_000], [4096, 20_000, 1, 257]):
        per_sequence = np.array(counts, np.int32)
        selected, positions = select_with_optimized_kernels(
            scores, per_sequence, max(counts)
        )
        for b, count in enumerate(counts):
            top_indices = top_k(scores[b], valid[b], count)
            np.testing.assert_array_equal(np.flatnonzero(selected[b]), top_indices)
            np.testing.assert_array_equal(positions[b, : len(top_indices)], top_indices)
            assert (positions[b, len(top_indices) :] == -1).all()
