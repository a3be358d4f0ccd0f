"""The kernels of `merge_tokens` and its gradient.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). With `@optimized`, it runs a test with optimized kernels only.
The oracle (oracle.py) merges one sequence with plain float64 loops. B sequences have N
tokens of width D, in K groups.
"""

import ml_dtypes
import numpy as np
import oracle
import ptx
import pytest
from conftest import assert_close
from kernel_cases import dtypes, labels_of, optimized, random, sizes
from seam import cuda
from vjp_cases import WIDTHS, assert_gradient, vjp_sizes, wide

import qm_cupy as qm
from qm_cupy.stages.merging.merge_tokens import merge_tokens_vjp_reference

pytestmark = pytest.mark.usefixtures("kernels")


def merged_of(tokens, labels, num_groups, mass):
    """Return the merged tokens (B, K, D) by the oracle."""
    mass = np.ones(labels.shape) if mass is None else mass
    return np.stack(
        [
            oracle.merge(x, [np.flatnonzero(row == k) for k in range(num_groups)], m)
            for x, row, m in zip(tokens, labels, mass, strict=True)
        ]
    )


@dtypes
@sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_merge_and_unmerge_tokens(dtype, num_tokens, weighted):
    batch, num_groups = 2, max(num_tokens // 4, 1)
    # Rows of one element, rows that are not whole vectors of 16 bytes, and rows that
    # are
    for dim in (1, 7, 32, 130):
        tokens = random((batch, num_tokens, dim), dtype)
        labels = labels_of(batch, num_tokens, num_groups)
        mass = None
        if weighted:
            mass = abs(random((batch, num_tokens), cuda.accumulation_dtype(dtype)))
            mass[labels == 1] = 0  # this group gets the plain mean
        got = qm.merge_tokens(tokens, labels, num_groups, mass=mass)
        assert got.dtype == dtype
        assert_close(got, merged_of(tokens, labels, num_groups, mass), dtype, "stored")
        out = ptx.empty(got.shape, dtype)
        # The result in `out` has the same bits.
        returned = qm.merge_tokens(tokens, labels, num_groups, mass=mass, out=out)
        assert returned is out
        np.testing.assert_array_equal(got, out)
        rebuilt = qm.unmerge_tokens(got, labels)
        # Every token gets the value of its group; padding gets 0.
        values = got[np.arange(batch)[:, None], labels]  # (B, N, D)
        wanted = np.where((labels >= 0)[..., None], values, 0).astype(dtype)
        np.testing.assert_array_equal(rebuilt, wanted)


@dtypes
@vjp_sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_merge_tokens_vjp(dtype, num_tokens, weighted):
    num_groups = max(num_tokens // 4, 1)
    labels = labels_of(2, num_tokens, num_groups)
    mass = None
    if weighted:
        mass = abs(random((2, num_tokens), cuda.accumulation_dtype(dtype), 4)) + 0.2
        mass[:, ::7] = 0
        mass[labels == 1] = 0  # this group gets the plain mean
    for dim in WIDTHS:
        tokens = random((2, num_tokens, dim), dtype)
        gradient = (random((2, num_groups, dim), np.float64, 1) / dim).astype(dtype)
        got = qm.merge_tokens_vjp(gradient, tokens, labels, num_groups, mass=mass)
        # The expected value is the NumPy reference in float64. Other tests compare this
        # reference with finite differences.
        weights = None if mass is None else wide(mass)
        inputs = wide(gradient), wide(tokens), labels, num_groups, weights
        wanted = merge_tokens_vjp_reference(*inputs)
        assert_gradient(got[0], wanted[0], dtype)
        if not weighted:
            assert got[1] is None
            continue
        assert_gradient(got[1], wanted[1], dtype, mass.dtype)
        assert not got[1][labels < 0].any()


@dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("unmerge_vjp", [False, True], ids=["merge", "gradient"])
@optimized
def test_rows_of_whole_vectors_have_the_same_sums(dtype, weighted, unmerge_vjp):
    """If rows are whole vectors, four members are read at once, with the same sums."""
    rng = np.random.default_rng(3)
    # Groups of 0, 1, …, 10 members, around multiples of four
    sizes = np.arange(11)
    labels = rng.permutation(np.repeat(sizes, sizes)).astype(np.int32)[None]
    tokens = rng.standard_normal((1, labels.size, 17)).astype(dtype)
    mass = None
    if weighted:
        mass = rng.random(labels.shape).astype(cuda.accumulation_dtype(dtype))
        mass[labels == 6] = 0

    def group_sums(x):
        if unmerge_vjp:
            return qm.unmerge_tokens_vjp(x, labels, len(sizes))
        return qm.merge_tokens(x, labels, len(sizes), mass=mass)

    # 16 elements are whole vectors in every dtype; 17 are not.
    whole_vectors = group_sums(np.ascontiguousarray(tokens[..., :16]))
    np.testing.assert_array_equal(whole_vectors, group_sums(tokens)[..., :16])


@dtypes
def test_means_of_numbers_whose_sum_overflows(dtype):
    """The mean is representable where the sum of tokens or of masses is not."""
    largest = float(ml_dtypes.finfo(dtype).max)
    acc_dtype = cuda.accumulation_dtype(dtype)
    heavy = 0.9 * float(np.finfo(acc_dtype).max)
    rng = np.random.default_rng(0)
    tokens = np.full((1, 13, 18), largest, dtype)
    tokens[:, :6] = rng.standard_normal((6, 18))  # groups of usual and of huge tokens
    tokens[0, 6::2, 1::2] *= -1
    labels = (np.arange(13) // 3)[None]  # the last group has one token
    for mass in (None, np.full((1, 13), heavy), rng.random((1, 13)) * heavy):
        mass = None if mass is None else mass.astype(acc_dtype)
        got = qm.merge_tokens(tokens, labels, 5, mass=mass).astype(np.float64)
        # The oracle computes with tokens and masses that are scaled down.
        scaled = tokens.astype(np.float64) / 2**8
        light = None if mass is None else mass.astype(np.float64) / heavy
        wanted = np.clip(merged_of(scaled, labels, 5, light) * 2**8, -largest, largest)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(
            got / largest, wanted / largest, rtol=1e-2, atol=1e-6
        )
        assert_close(got[:, :2], wanted[:, :2], dtype, "stored")


@dtypes
def test_gradients_of_masses_whose_sum_overflows(dtype):
    """The weights of members are ratios of masses, which do not overflow."""
    acc_dtype = cuda.accumulation_dtype(dtype)
    tokens, labels = random((1, 9, 18), dtype), (np.arange(9) // 3)[None]
    gradient, light = random((1, 3, 18), dtype, 1), abs(random((1, 9), acc_dtype, 2))
    heavy = light / light.max() * np.finfo(acc_dtype).max
    wanted = qm.merge_tokens_vjp(gradient, tokens, labels, 3, mass=light)[0]
    got, by_mass = qm.merge_tokens_vjp(gradient, tokens, labels, 3, mass=heavy)
    assert_close(got, wanted.astype(np.float64), dtype, "stored")
    assert np.isfinite(by_mass).all()
