"""Saliency, π and mass from entropies, in one launch or in three.

In one launch, a block computes a sequence: it keeps the saliency in registers. For
larger sequences there are three launches: the range of each layer, the saliency, and
then π and the mass. The fixture `kernels` runs a test with basic and with optimized
kernels, in the PTX interpreter (tests/ptx). With `@optimized`, it runs a test with
optimized kernels only.
"""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, mask_of, masked, optimized, random, sizes, valid_of
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.selection import saliency_gumbel_mass
from qm_cupy.stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda

pytestmark = pytest.mark.usefixtures("kernels")

# Names of the kernels that are launched
ONE_LAUNCH = ["saliency_gumbel_mass"]
THREE_LAUNCHES = ["entropy_range", "saliency", "gumbel_softmax"]
# Largest L·H·N, entropies of a sequence, and largest N in registers, for one launch
MAX_ENTROPIES = saliency_gumbel_mass.ENTROPIES_OF_A_BLOCK
MAX_IN_REGISTERS = cuda.THREAD_TOKENS * cuda.SELECTION_THREADS

# (L, B, H, N). N is around the tokens of a warp (32), of a block (256) and of a part of
# a row (1024). L is around the number of warps of a block, and around the number of
# layers (32) whose ranges are in shared memory at once.
SHAPES = [
    (1, 1, 1, 1), (9, 2, 3, 31), (3, 2, 1, 33), (31, 1, 2, 5), (33, 2, 1, 7),
    (70, 1, 1, 3), (2, 2, 5, 257), (5, 1, 1, 1024), (3, 2, 2, 1025), (1, 1, 3, 2049),
]  # fmt: skip


@dtypes
@sizes
@masked
@optimized
def test_saliency_gumbel_mass_in_one_launch(dtype, num_tokens, masked):
    layers, batch, heads = 3, 3, 2
    mask = mask_of(batch, num_tokens, masked)
    entropy = abs(random((layers, batch, heads, num_tokens), dtype))
    entropy[1] = 2  # a constant layer normalises to 0
    valid = valid_of(mask, (batch, num_tokens))
    for seed, salient in ((None, "low"), (11, "high")):
        options = 0.1, (seed, 4), 0.01, mask
        got = saliency_gumbel_mass_cuda(entropy, salient, *options)
        # Compare the result of each stage with the public function of that stage.
        s = qm.saliency(entropy, salient=salient, mask=mask)
        np.testing.assert_allclose(got[0], s, rtol=1e-6, atol=1e-6)
        noise_options = {"seed": seed, "sequence_offset": 4, "mask": mask}
        p = qm.gumbel_softmax(s, temperature=0.1, **noise_options)
        assert_close(got[1], p, dtype)
        m = qm.saliency_mass(s, p, epsilon=0.01)
        assert_close(got[2], np.where(valid, m, 0), dtype)


def random_entropy(shape, dtype):
    """Return entropies (L, B, H, N) with ties and, if L > 1, a constant layer."""
    entropy = abs(random(shape, dtype, seed=sum(shape)))
    entropy[0, :, :, ::3] = 2
    if len(entropy) > 1:
        entropy[1] = 2
    return entropy


def results_of(entropy, mask, salient="low", seed=11):
    """Return saliency, π and mass, each (B, N)."""
    return saliency_gumbel_mass.saliency_gumbel_mass_cuda(
        entropy, salient, 0.1, (seed, 4), 0.01, mask
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@masked
@optimized
def test_one_launch_gives_the_bits_of_three_launches(
    dtype, shape, masked, launches, monkeypatch
):
    _, batch, _, num_tokens = shape
    entropy, mask = random_entropy(shape, dtype), mask_of(batch, num_tokens, masked)
    for salient, seed in (("low", None), ("high", 11)):
        results = []
        # The patch selects one launch or three launches for every shape.
        for one, names in ((True, ONE_LAUNCH), (False, THREE_LAUNCHES)):
            monkeypatch.setattr(
                saliency_gumbel_mass, "_one_launch", lambda *_, one=one: one
            )
            launches.clear()
            results.append(results_of(entropy, mask, salient, seed))
            assert launches == names
        for x, y in zip(*results, strict=True):
            assert x.shape == y.shape == (batch, num_tokens)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@masked
@optimized
def test_saliency_has_the_bits_of_the_basic_kernel(dtype, shape, masked):
    _, batch, _, num_tokens = shape
    entropy, mask = random_entropy(shape, dtype), mask_of(batch, num_tokens, masked)
    got = qm.saliency(entropy, mask=mask)
    with qm.use_kernels("basic"):
        np.testing.assert_array_equal(got, qm.saliency(entropy, mask=mask))


@optimized
def test_range_of_a_row_with_more_parts_than_a_warp_has_lanes():
    # A row of 34,000 tokens has ⌈34,000 / (4 · 256)⌉ = 34 parts, each with a range. A
    # warp joins the ranges, and has 32 lanes.
    entropy = random_entropy((1, 1, 1, 34_000), np.float32)
    entropy[..., -1] = 9  # the maximum is in the last part
    got = qm.saliency(entropy)
    assert got[0, -1] == got.min() == 0
    with qm.use_kernels("basic"):
        np.testing.assert_array_equal(got, qm.saliency(entropy))


@optimized
def test_nan_in_padding_changes_no_bit():
    """This holds for one launch and for three launches."""
    shape = 3, 3, 2, 70  # L, B, H, N
    entropy, mask = random_entropy(shape, np.float32), mask_of(shape[1], shape[3])
    padding = np.broadcast_to(~mask[:, None], shape)
    for one in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saliency_gumbel_mass, "_one_launch", lambda *_, one=one: one)
            with_zeros = results_of(np.where(padding, 0, entropy), mask)
            with_nan = results_of(np.where(padding, np.float32(np.nan), entropy), mask)
        for x, y in zip(with_zeros, with_nan, strict=True):
            np.testing.assert_array_equal(x, y)
            assert np.isfinite(x).all()
            assert not x[~mask].any()


@optimized
def test_range_that_flushes_to_zero_counts_as_constant():
    # max - min is a subnormal number, which the kernels flush to 0. Without a check
    # they would divide 0 by 0.
    tiny = np.finfo(np.float32).smallest_subnormal
    entropy = np.full((1, 1, 1, 40), np.finfo(np.float32).tiny)
    entropy[..., ::2] += tiny
    s, p, m = results_of(entropy, None)
    np.testing.assert_array_equal(s, 1)
    assert np.isfinite(p).all()
    assert np.isfinite(m).all()


@pytest.mark.parametrize(
    ("shape", "one"),
    [  # L·H·N at its limit and above it, and N at its limit and above it
        ((1, 1, 1, 64), True), ((16, 1, 2, MAX_ENTROPIES // 32), True),
        ((16, 1, 2, MAX_ENTROPIES // 32 + 1), False),
        ((1, 1, 8, MAX_IN_REGISTERS), True), ((1, 1, 9, MAX_IN_REGISTERS), False),
        ((1, 1, 1, MAX_IN_REGISTERS + 1), False),
        ((MAX_ENTROPIES // 32 + 1, 1, 32, 1), False),
    ],
    ids=str,
)  # fmt: skip
@optimized
def test_limits_of_one_launch(shape, one, launches):
    got = results_of(random_entropy(shape, np.float32), None)
    assert launches == (ONE_LAUNCH if one else THREE_LAUNCHES)
    if shape[-1] > MAX_IN_REGISTERS:
        return  # one launch is not possible: the row does not fit in registers
    # The other number of launches gives the same bits.
    launches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency_gumbel_mass, "_one_launch", lambda *_: not one)
        other = results_of(random_entropy(shape, np.float32), None)
    assert launches == (THREE_LAUNCHES if one else ONE_LAUNCH)
    for x, y in zip(got, other, strict=True):
        np.testing.assert_array_equal(x, y)
