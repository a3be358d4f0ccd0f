"""The kernels of gradients through softmax(scores), run by the interpreter."""

import numpy as np
import pytest
from kernel_cases import dtypes, mask_of, optimized, random
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.saliency import score_gradients as gradients_page

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e3, 1e30])
@dtypes
def test_gradients_of_any_size(dtype, size):
    """The band is stored relative to its gradient: float16 does not overflow there."""
    # Scaling a gradient by 1e30 must not move the band out of the range of its dtype.
    if dtype == np.float16 and not 1e-5 < size < 1e5:
        pytest.skip("the results themselves are beyond float16")
    query, key = random((2, 40, 8), dtype, 1), random((2, 40, 8), dtype, 2)
    gradient = random((2, 40), np.float32)
    wanted = qm.query_key_entropy_vjp(gradient, query, key)
    got = qm.query_key_entropy_vjp(gradient * np.float32(size), query, key)
    # The gradient is linear in g, up to the rounding of the stored band.
    relative = {2: 2e-2, 4: 1e-5, 8: 1e-6}[np.dtype(dtype).itemsize]
    for x, y in zip(got, wanted, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64) * size
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * abs(y).max())


@pytest.mark.parametrize("num_tokens", [32, 150])
@optimized
def test_tf32(num_tokens):
    """TF32 keeps 10 bits of each factor, in the scores and in their gradients."""
    tokens = random((2, num_tokens, 40), np.float32)
    gradient = random((2, num_tokens), np.float32, 3)
    wanted = qm.self_attention_entropy_vjp(gradient, tokens)
    with qm.allow_tf32():
        got = qm.self_attention_entropy_vjp(gradient, tokens)
    assert (got != wanted).any()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-2 * abs(wanted).max())


def test_memory_is_linear_in_the_tokens(monkeypatch):
    """A band of one tile of rows, as for very many tokens."""
    monkeypatch.setattr(gradients_page, "_BAND_BYTES", 0)
    held, empty = [], cuda.empty

    def counted(shape, dtype):
        held.append(empty(shape, dtype))
        return held[-1]

    monkeypatch.setattr(cuda, "empty", counted)
    # One and two tiles. An N × N array would grow fourfold.
    bytes_of = []
    for num_tokens in (128, 256):
        held.clear()
        tokens = random((num_tokens, 4), np.float32)
        qm.query_key_entropy_vjp(tokens[:, 0], tokens, tokens)
        bytes_of.append(sum(x.nbytes for x in held))
    assert bytes_of[1] <= 2 * bytes_of[0]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@dtypes
def test_bands_change_no_bit(dtype, causal, monkeypatch):
    # Two tiles of rows for each of four heads; a mask and causal edges cross them.
    shape = (1, 2, 2, 140, 24)
    query, key = random(shape, dtype, 1), random(shape, dtype, 2)
    gradient = random(shape[:-1], np.float32)
    options = {"causal": causal, "mask": mask_of(2, 140)}
    wanted = qm.query_key_entropy_vjp(gradient, query, key, **options)
    # Bytes for one tile at a time, and for several but not all.
    for size in (0, 400_000):
        monkeypatch.setattr(gradients_page, "_BAND_BYTES", size)
        got = qm.query_key_entropy_vjp(gradient, query, key, **options)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x, y)
