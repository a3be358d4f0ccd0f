"""The kernels of gradients through the softmax of scores.

The kernels compute the score gradients (N, N) of a head in bands: a number of row tiles
of 128 rows, which fit in _BAND_BYTES. The fixture `kernels` runs a test with basic and
with optimized kernels, in the PTX interpreter (tests/ptx). With `@optimized`, it runs a
test with optimized kernels only.
"""

import numpy as np
import pytest
from kernel_cases import dtypes, mask_of, optimized, random
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.saliency import score_gradients as gradients_module

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e3, 1e30])
@dtypes
def test_gradient_is_linear_for_any_size_of_the_gradient(dtype, size):
    """A band is stored relative to the gradient of its head.

    So a gradient of 1e30 or 1e-30 does not make the band overflow or become 0.
    """
    if dtype == np.float16 and not 1e-5 < size < 1e5:
        pytest.skip("the results themselves are beyond float16")
    query, key = random((2, 40, 8), dtype, 1), random((2, 40, 8), dtype, 2)
    gradient = random((2, 40), np.float32)
    wanted = qm.query_key_entropy_vjp(gradient, query, key)
    got = qm.query_key_entropy_vjp(gradient * np.float32(size), query, key)
    # The tolerance, by bytes of the dtype, allows for the rounding of the stored band.
    relative = {2: 2e-2, 4: 1e-5, 8: 1e-6}[np.dtype(dtype).itemsize]
    for x, y in zip(got, wanted, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64) * size
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * abs(y).max())


@pytest.mark.parametrize("num_tokens", [32, 150])
@optimized
def test_gradients_with_tf32_are_near_those_of_float32(num_tokens):
    """TF32 keeps 10 bits of the mantissa of factors, in the scores and in the band."""
    tokens = random((2, num_tokens, 40), np.float32)
    gradient = random((2, num_tokens), np.float32, 3)
    wanted = qm.self_attention_entropy_vjp(gradient, tokens)
    with qm.allow_tf32():
        got = qm.self_attention_entropy_vjp(gradient, tokens)
    assert (got != wanted).any()  # TF32 was used
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-2 * abs(wanted).max())


def test_memory_is_linear_in_the_tokens(monkeypatch):
    """With 0 bytes for a band, it has one row tile, as for very many tokens."""
    monkeypatch.setattr(gradients_module, "_BAND_BYTES", 0)
    arrays, empty = [], cuda.empty

    def recorded_empty(shape, dtype):
        arrays.append(empty(shape, dtype))
        return arrays[-1]

    monkeypatch.setattr(cuda, "empty", recorded_empty)
    # N is one and two tiles. N × N values would need four times the memory.
    total_bytes = []
    for num_tokens in (128, 256):
        arrays.clear()
        tokens = random((num_tokens, 4), np.float32)
        qm.query_key_entropy_vjp(tokens[:, 0], tokens, tokens)
        total_bytes.append(sum(x.nbytes for x in arrays))
    assert total_bytes[1] <= 2 * total_bytes[0]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@dtypes
def test_size_of_the_band_changes_no_bit(dtype, causal, monkeypatch):
    # 140 tokens are two row tiles for each of four heads. A band may end within a head.
    shape = (1, 2, 2, 140, 24)
    query, key = random(shape, dtype, 1), random(shape, dtype, 2)
    gradient = random(shape[:-1], np.float32)
    options = {"causal": causal, "mask": mask_of(2, 140)}
    wanted = qm.query_key_entropy_vjp(gradient, query, key, **options)
    # Bytes of a band with one row tile, and of a band with several row tiles, but not
    # with all of them
    for band_bytes in (0, 400_000):
        monkeypatch.setattr(gradients_module, "_BAND_BYTES", band_bytes)
        got = qm.query_key_entropy_vjp(gradient, query, key, **options)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x, y)
