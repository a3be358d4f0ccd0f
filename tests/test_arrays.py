from itertools import product

import numpy as np
import pytest
from conftest import to_library

import qm_cupy as qm


@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        *product(["numpy", "torch"], ["float16", "float32", "float64"]),
        *product(["array_api_strict"], ["float32", "float64"]),  # it has no float16
    ],
)
def test_same_bits_whatever_the_library(library, rng, dtype):
    tokens = rng.standard_normal((2, 20, 6)).astype(dtype)
    mask = np.ones((2, 20), bool)
    mask[0, 15:] = False
    wanted = qm.quickmerge(tokens, 0.3, mask=mask)
    given, kept = to_library(library, tokens), to_library(library, mask)
    got = qm.quickmerge(given, 0.3, mask=kept)
    for x, y in zip(got, wanted, strict=True):
        assert type(x) is type(given)
        assert np.asarray(x).dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize("tokens", [[[1.0, 2.0]], 3.0, None, "x", range(3)])
def test_not_an_array(tokens):
    with pytest.raises(TypeError, match="`tokens` must be an array"):
        qm.quickmerge(tokens, 1)


@pytest.mark.parametrize("kind", [np.int64, np.complex128, np.bool_, object])
def test_dtypes_that_are_no_tokens(kind):
    with pytest.raises(TypeError, match="must be float16, float32 or float64, got"):
        qm.quickmerge(np.ones((4, 2)).astype(kind), 1)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 4, 3), ()])
def test_wrong_ndim(shape):
    with pytest.raises(
        ValueError, match=r"must have shape \(N, D\) or \(B, N, D\), got"
    ):
        qm.norm_saliency(np.ones(shape))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4), (2, 4, 0)])
def test_empty(shape):
    with pytest.raises(ValueError, match="`tokens` must not be empty, got shape"):
        qm.quickmerge(np.ones(shape), 1)


def test_mixed_libraries():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="`tokens` of numpy, `mask` of torch"):
        qm.norm_saliency(np.ones((4, 2)), mask=torch.ones(4, dtype=torch.bool))


def test_torch_that_requires_grad():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"`tokens` cannot be read.*detach"):
        qm.norm_saliency(torch.ones((4, 2), requires_grad=True))


def test_masked_array():
    with pytest.raises(TypeError, match="`tokens` is a NumPy masked array"):
        qm.norm_saliency(np.ma.ones((4, 2)))


def test_device_that_is_not_the_cpu():
    class OnGpu:
        def __dlpack__(self):
            raise AssertionError("must not be read")

        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(ValueError, match="`tokens` must be in CPU memory"):
        qm.norm_saliency(OnGpu())


def test_producer_of_no_known_library(rng):
    """Any object that speaks DLPack comes in; results are NumPy's."""

    class Producer:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **options):
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    tokens = rng.standard_normal((9, 4))
    np.testing.assert_array_equal(
        qm.norm_saliency(Producer(tokens)), qm.norm_saliency(tokens)
    )


def test_foreign_byte_order(rng):
    tokens = rng.standard_normal((9, 4))
    np.testing.assert_array_equal(
        qm.quickmerge(tokens.astype(">f8"), 3).tokens, qm.quickmerge(tokens, 3).tokens
    )


def test_memory_map(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.standard_normal((9, 4)))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    merged = qm.quickmerge(mapped, 3).tokens
    assert type(merged) is np.ndarray


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones(4), TypeError, "`mask` must be boolean"),
        (np.ones(3, bool), ValueError, r"`mask` must have shape \(N\) = \(4,\)"),
        (np.zeros(4, bool), ValueError, "must leave at least one token"),
        ([True] * 4, TypeError, "`mask` must be an array"),
    ],
)
def test_masks_that_are_none(mask, error, message):
    with pytest.raises(error, match=message):
        qm.quickmerge(np.ones((4, 2)), 1, mask=mask)


def test_empty_row_of_a_mask_is_named():
    mask = np.array([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"sequence \(1,\) has none"):
        qm.quickmerge(np.ones((2, 2, 3)), 1, mask=mask)


def test_check_finite_can_be_switched_off():
    tokens = np.array([[1.0], [np.nan]])
    with qm.check_finite(False):
        assert np.isnan(qm.unmerge_tokens(tokens, np.array([1, 1]))).all()
    with pytest.raises(ValueError, match=r"got nan at index \(1, 0\)"):
        qm.unmerge_tokens(tokens, np.array([1, 1]))


def test_a_sum_that_overflows_is_not_an_infinity():
    assert qm.norm_saliency(np.full((9, 4), 60000, np.float16)).shape == (9,)
