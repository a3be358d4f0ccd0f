"""Compares every public function on a GPU with the NumPy reference; needs CuPy."""

import numpy as np
import pytest
from conftest import TF32_TOLERANCE
from gpu_at_hand import cupy
from gpu_calls import BATCH, NAMES, calls
from gpu_parity import (
    SIZES,
    check,
    marks,
    on_host,
    reference,
    reference_of,
    run,
)

import qm_cupy as qm

pytestmark = marks


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, num_tokens, masked, gpu_kernels, gpu_dtype):
    got = run(calls(num_tokens, masked)[name], "cupy", gpu_dtype)
    wanted = reference(name, num_tokens, masked, False, gpu_dtype)
    check(name, got, wanted, "cupy", gpu_dtype)


@pytest.mark.parametrize("name", NAMES)
def test_num_groups_per_sequence(name, gpu_library, gpu_kernels, gpu_dtype):
    # K per sequence leaves padded groups in the results, which must be zero.
    got = run(calls(33, masked=True, ragged=True)[name], gpu_library, gpu_dtype)
    wanted = reference(name, 33, True, True, gpu_dtype)
    check(name, got, wanted, gpu_library, gpu_dtype)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name, gpu_library, gpu_kernels, gpu_dtype):
    # Kernels need contiguous rows, so the library must copy these inputs first.
    got = run(calls(33, masked=True)[name], gpu_library, gpu_dtype, strided=True)
    wanted = reference(name, 33, True, False, gpu_dtype)
    check(name, got, wanted, gpu_library, gpu_dtype)


def without_sequences(x):
    """Return an array (B, …) or (L, B, …), or a tuple of layers, with B = 0."""
    if type(x) is tuple:
        return tuple(map(without_sequences, x))
    if isinstance(x, np.ndarray) and BATCH in x.shape:
        return np.take(x, [], axis=x.shape.index(BATCH))
    return x


@pytest.mark.parametrize("name", [name for name in NAMES if name != "MLPPrior.fit"])
def test_empty_batch(name, gpu_kernels, gpu_dtype):
    # The empty batch launches nothing, but shapes and dtypes must be the same.
    function, arguments = calls(33)[name]
    arguments = {k: without_sequences(x) for k, x in arguments.items()}
    call = function, arguments
    got = run(call, "cupy", gpu_dtype)
    check(name, got, reference_of(name, call, gpu_dtype), "cupy", gpu_dtype)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_run(name, gpu_kernels, gpu_dtype):
    # Bits, not values: a float atomic would add in another order in each run.
    call = calls(SIZES[0], masked=True)[name]
    first, again = run(call, "cupy", gpu_dtype), run(call, "cupy", gpu_dtype)
    for x, y in zip(first, again, strict=True):
        assert on_host(x).tobytes() == on_host(y).tobytes()


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("name", TF32_TOLERANCE)
def test_tf32_is_near_the_reference(name, num_tokens):
    """With the optimized kernels; gradients are compared by their largest entry."""
    with qm.allow_tf32():
        got = run(calls(num_tokens)[name], "cupy", np.dtype("f4"))
    wanted = reference(name, num_tokens, False, False, np.dtype("f4"))
    for x, y in zip(got, wanted, strict=True):
        # A bound for values of about 1; of gradients only the largest entry is
        # known.
        peak = abs(y).max()
        room = TF32_TOLERANCE[name] * (peak if "vjp" in name else max(peak, 1))
        np.testing.assert_allclose(on_host(x), y, rtol=0, atol=room)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_scores_are_ordered(dtype, gpu_kernels):
    """CuPy compiles with -ftz=true, which makes subnormal floats compare as equal."""
    tiny = np.finfo(dtype).smallest_subnormal
    scores = np.random.default_rng(0).permutation(300).astype(dtype) * tiny
    scores[::7] *= -1  # both signs
    got = qm.select_tokens(cupy.asarray(scores), 100).get()
    np.testing.assert_array_equal(got, qm.select_tokens(scores, 100))
