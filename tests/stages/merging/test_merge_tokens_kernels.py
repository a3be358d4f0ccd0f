"""The kernels of `merge_tokens` and its gradient, run by the interpreter."""

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
    mass = np.ones(labels.shape) if mass is None else mass
    return np.stack(
        [
            oracle.merge(x, [np.flatnonzero(own == k) for k in range(num_groups)], m)
            for x, own, m in zip(tokens, labels, mass, strict=True)
        ]
    )


@dtypes
@sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_merge_and_unmerge_tokens(dtype, num_tokens, weighted):
    batch, num_groups = 2, max(num_tokens // 4, 1)
    # One element, rows that are not whole vectors of 16 bytes, and rows that are.
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
        # `out` gets the same bits.
        again = qm.merge_tokens(tokens, labels, num_groups, mass=mass, out=out)
        assert again is out
        np.testing.assert_array_equal(got, out)
        back = qm.unmerge_tokens(got, labels)
        # Every token gets the value of its group; padding gets 0.
        group = got[np.arange(batch)[:, None], labels]
        wanted = np.where((labels >= 0)[..., None], group, 0).astype(dtype)
        np.testing.assert_array_equal(back, wanted)


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
        # The NumPy reference in float64; other tests compare it with differences.
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
@pytest.mark.parametrize("gradient", [False, True], ids=["merge", "gradient"])
@optimized
def test_rows_of_whole_vectors_have_the_same_sums(dtype, weighted, gradient):
    """If rows are whole vectors, four members are read at once, with the same sums."""
    rng = np.random.default_rng(3)
    sizes = np.arange(11)  # of groups: no member, and around multiples of four
    labels = rng.permutation(np.repeat(sizes, sizes)).astype(np.int32)[None]
    tokens = rng.standard_normal((1, labels.size, 17)).astype(dtype)
    mass = None
    if weighted:
        mass = rng.random(labels.shape).astype(cuda.accumulation_dtype(dtype))
        mass[labels == 6] = 0

    def measure(x):
        if gradient:
            return qm.unmerge_tokens_vjp(x, labels, len(sizes))
        return qm.merge_tokens(x, labels, len(sizes), mass=mass)

    # 16 elements are whole vectors in every dtype; 17 are not.
    whole = measure(np.ascontiguousarray(tokens[..., :16]))
    np.testing.assert_array_equal(whole, measure(tokens)[..., :16])
