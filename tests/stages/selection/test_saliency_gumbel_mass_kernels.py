"""Mass from entropies: one launch with a block for each sequence, or three launches."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, mask_of, masked, optimized, random, sizes, valid_of
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.selection import saliency_gumbel_mass
from qm_cupy.stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda

pytestmark = pytest.mark.usefixtures("kernels")

ONE = ["saliency_gumbel_mass"]
THREE = ["entropy_range", "saliency", "gumbel_softmax"]
LIMIT = saliency_gumbel_mass.ENTROPIES_OF_A_BLOCK
# Tokens of a sequence that a block can keep in registers.
HELD = cuda.THREAD_TOKENS * cuda.SELECTION_THREADS

# (L, B, H, N). One warp and more. L around the number of warps of a block and around
# the number of ranges that are kept at once. N around a warp, a block and a part.
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
        # Each stage is compared with the public function of that stage.
        s = qm.saliency(entropy, salient=salient, mask=mask)
        np.testing.assert_allclose(got[0], s, rtol=1e-6, atol=1e-6)
        drawn = {"seed": seed, "sequence_offset": 4, "mask": mask}
        p = qm.gumbel_softmax(s, temperature=0.1, **drawn)
        assert_close(got[1], p, dtype)
        m = qm.saliency_mass(s, p, epsilon=0.01)
        assert_close(got[2], np.where(valid, m, 0), dtype)


def random_entropy(shape, dtype):
    entropy = abs(random(shape, dtype, seed=sum(shape)))
    entropy[0, :, :, ::3] = 2  # ties
    if len(entropy) > 1:
        entropy[1] = 2  # a constant layer
    return entropy


def masses(entropy, mask, salient="low", seed=11):
    return saliency_gumbel_mass.saliency_gumbel_mass_cuda(
        entropy, salient, 0.1, (seed, 4), 0.01, mask
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@masked
@optimized
def test_one_launch_gives_the_bits_of_three(
    dtype, shape, masked, launches, monkeypatch
):
    _, batch, _, num_tokens = shape
    entropy, mask = random_entropy(shape, dtype), mask_of(batch, num_tokens, masked)
    for salient, seed in (("low", None), ("high", 11)):
        results = []
        # The patch forces one launch or three, for every shape.
        for one, names in ((True, ONE), (False, THREE)):
            monkeypatch.setattr(
                saliency_gumbel_mass, "_one_launch", lambda *_, one=one: one
            )
            launches.clear()
            results.append(masses(entropy, mask, salient, seed))
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
def test_a_range_of_more_parts_than_a_warp_has_lanes():
    # 34,000 / (4 · 256) = 34 parts, and a warp has 32 lanes to join them.
    entropy = random_entropy((1, 1, 1, 34_000), np.float32)
    entropy[..., -1] = 9  # the maximum is in the last part
    got = qm.saliency(entropy)
    assert got[0, -1] == got.min() == 0
    with qm.use_kernels("basic"):
        np.testing.assert_array_equal(got, qm.saliency(entropy))


@optimized
def test_padding_may_hold_anything():
    """A NaN in padding changes nothing, in one launch or in three."""
    shape = 3, 3, 2, 70  # L, B, H, N
    entropy, mask = random_entropy(shape, np.float32), mask_of(shape[1], shape[3])
    hidden = np.broadcast_to(~mask[:, None], shape)
    for one in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saliency_gumbel_mass, "_one_launch", lambda *_, one=one: one)
            clean = masses(np.where(hidden, 0, entropy), mask)
            dirty = masses(np.where(hidden, np.float32(np.nan), entropy), mask)
        for x, y in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(x, y)
            assert np.isfinite(x).all()
            assert not x[~mask].any()


@optimized
def test_a_width_that_flushes_to_zero_counts_as_constant():
    # max - min is a subnormal number, which kernels flush to 0: no division by 0.
    tiny = np.finfo(np.float32).smallest_subnormal
    entropy = np.full((1, 1, 1, 40), np.finfo(np.float32).tiny)
    entropy[..., ::2] += tiny
    s, p, m = masses(entropy, None)
    np.testing.assert_array_equal(s, 1)
    assert np.isfinite(p).all()
    assert np.isfinite(m).all()


@pytest.mark.parametrize(
    ("shape", "one"),
    [  # L·H·N at the limit and above it, and N at HELD and above it
        ((1, 1, 1, 64), True), ((16, 1, 2, LIMIT // 32), True),
        ((16, 1, 2, LIMIT // 32 + 1), False), ((1, 1, 8, HELD), True),
        ((1, 1, 9, HELD), False), ((1, 1, 1, HELD + 1), False),
        ((LIMIT // 32 + 1, 1, 32, 1), False),
    ],
    ids=str,
)  # fmt: skip
@optimized
def test_the_threshold(shape, one, launches):
    got = masses(random_entropy(shape, np.float32), None)
    assert launches == (ONE if one else THREE)
    if shape[-1] > HELD:
        return  # the registers of one launch cannot keep such a row
    launches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency_gumbel_mass, "_one_launch", lambda *_: not one)
        other = masses(random_entropy(shape, np.float32), None)
    assert launches == (THREE if one else ONE)
    for x, y in zip(got, other, strict=True):
        np.testing.assert_array_equal(x, y)
