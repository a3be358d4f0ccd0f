"""Every public function with every array library on the CPU: one body for all."""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import LIBRARIES, to_library, to_numpy
from gpu_calls import calls
from gpu_parity import HOST, ROUNDED, array_types, leaves

import qm_cupy as qm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = "float16", "bfloat16", "float32", "float64"
# `decode` and `token_budget` are not in the table of calls for a GPU.
CALLS = {
    **{name: x for name, x in calls(33, masked=True).items() if name not in HOST},
    "decode": (lambda tokens: qm.decode(tokens, abs), {"tokens": np.ones((3, 9, 4))}),
    "token_budget": (qm.token_budget, {"budget": 0.3, "num_tokens": np.arange(7, 9)}),
}
TYPES = {"token_budget": ["int64"]}


def arguments(name, dtype):
    """Return the arguments of a call as NumPy arrays, floating ones in `dtype`."""
    _, inputs = CALLS[name]
    return of_arrays(lambda x: x.astype(dtype) if is_floating(x) else x, inputs)


def of_arrays(change, inputs, array_type=np.ndarray):
    """Return arguments with changed arrays, also those of layers in a tuple."""

    def changed(x):
        if isinstance(x, tuple):
            return tuple(map(changed, x))
        return change(x) if isinstance(x, array_type) else x

    return {name: changed(x) for name, x in inputs.items()}


def is_floating(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def convert(library, inputs):
    """Return the arguments with arrays of a library instead of NumPy's."""
    return of_arrays(lambda x: to_library(library, x), inputs)


def run(name, inputs):
    return leaves(CALLS[name][0](**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_same_kind_and_the_same_bits(name, dtype, library):
    if library == "array_api_strict" and dtype.endswith("16"):
        pytest.skip("array-api-strict has no 16 bits")
    storage = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    arrays = arguments(name, storage)
    wanted, converted = run(name, arrays), convert(library, arrays)
    inputs = [x for x in converted.values() if hasattr(x, "__dlpack__")]
    before = [to_numpy(x).copy() for x in inputs]
    got = run(name, converted)
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        if library != "numpy":
            assert type(x) is type(inputs[0])
            assert x.device == inputs[0].device
        actual = to_numpy(x)
        assert actual.dtype == y.dtype
        assert actual.flags.c_contiguous
        # Bits, not values: every library must reach the same NumPy reference.
        assert actual.tobytes() == np.asarray(y).tobytes()
        # A result must be fresh, or a later change of the input would change it.
        assert not any(np.may_share_memory(actual, to_numpy(a)) for a in inputs)
    types = TYPES.get(name, [type_name for type_name, _ in array_types(name, storage)])
    if name == "decode":  # it returns what `abs` returns: the dtype of the tokens
        types = [storage.name]
    assert [y.dtype.name for y in wanted] == types
    # Inputs are never written to.
    for x, y in zip(inputs, before, strict=True):
        assert to_numpy(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ROUNDED])
def test_bfloat16_is_float32_rounded_once(name):
    inputs = arguments(name, BFLOAT16)
    # A float32 holds every bfloat16 value, so only the result is rounded.
    wide = {
        k: x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == BFLOAT16
        else x for k, x in inputs.items()
    }  # fmt: skip
    for x, y in zip(run(name, inputs), run(name, wide), strict=True):
        np.testing.assert_array_equal(x, y.astype(x.dtype))


def strided(x):
    return np.repeat(x, 2, axis=-1)[..., ::2]  # the same values with gaps


def backwards(x):
    return x[..., ::-1].copy()[..., ::-1]  # negative strides


def fortran(x):
    return np.asfortranarray(x)


def read_only(x):
    # NumPy marks arrays of a memory-mapped file like this.
    x = x.copy()
    x.flags.writeable = False
    return x


def repeated(x):
    return np.broadcast_to(x[:1], x.shape)  # strides of 0


@pytest.mark.parametrize("layout", [strided, backwards, fortran, read_only, repeated])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_any_layout(name, dtype, layout):
    plain = arguments(name, BFLOAT16 if dtype == "bfloat16" else dtype)
    inputs = of_arrays(layout, plain)
    copies = of_arrays(lambda x: x.copy(), inputs)
    got = run(name, inputs)
    # `decode` returns arrays of the model.
    assert name == "decode" or all(x.flags.c_contiguous for x in got)
    same_results(got, run(name, copies))
    for k, x in inputs.items():
        if isinstance(x, np.ndarray):
            assert x.tobytes() == copies[k].tobytes()


@pytest.mark.parametrize("layout", ["strided", "transposed", "repeated"])
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_of_torch(name, layout):
    torch = pytest.importorskip("torch")
    # The layouts that NumPy's test has, except negative strides, which torch does
    # not have.
    change = {
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        "repeated": lambda x: x[:1].expand(x.shape),
    }[layout]
    converted = convert("torch", arguments(name, BFLOAT16))
    inputs = of_arrays(change, converted, torch.Tensor)
    copies = of_arrays(torch.Tensor.contiguous, inputs, torch.Tensor)
    same_results(run(name, inputs), run(name, copies))


def same_results(got, wanted):
    """Compare bits: no function gives BLAS an array that is not in C order."""
    for x, y in zip(got, wanted, strict=True):
        assert to_numpy(x).tobytes() == to_numpy(y).tobytes()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_an_empty_batch_gives_the_results_of_numpy(name, library):
    """The call works, or raises the same error, which names the argument."""
    inputs = of_arrays(lambda x: x[:0], arguments(name, np.float32))
    try:
        wanted, refused = run(name, inputs), None
    except ValueError as error:
        wanted, refused = [], str(error)
    if refused:
        with pytest.raises(ValueError, match=re.escape(refused)):
            run(name, convert(library, inputs))
        assert "`" in refused  # the error names an argument
        return
    got = run(name, convert(library, inputs))
    assert [tuple(x.shape) for x in got] == [x.shape for x in wanted]


class TestOut:
    """`out=` returns the same object, written in place, if arrays can be written."""

    @pytest.fixture
    def inputs(self, library):
        tokens = np.arange(24.0).reshape(2, 4, 3)
        labels = np.array([[0, 0, 1, 1], [0, 1, 1, 0]], np.int32)
        return to_library(library, tokens), to_library(library, labels)

    def test_it_is_written(self, inputs, library):
        tokens, labels = inputs
        # (2, K, D), NaN where not written.
        merged = to_library(library, np.full((2, 2, 3), np.nan))
        if library == "jax":
            with pytest.raises(TypeError, match="`out` cannot be written: JAX arrays"):
                qm.merge_tokens(tokens, labels, 2, out=merged)
            return
        assert qm.merge_tokens(tokens, labels, 2, out=merged) is merged
        wanted = qm.merge_tokens(tokens, labels, 2)
        np.testing.assert_array_equal(to_numpy(merged), to_numpy(wanted))
        back = to_library(library, np.full((2, 4, 3), np.nan))
        assert qm.unmerge_tokens(merged, labels, out=back) is back
        wanted = qm.unmerge_tokens(merged, labels)
        np.testing.assert_array_equal(to_numpy(back), to_numpy(wanted))

    def test_bfloat16_of_torch(self):
        tokens = to_library("torch", np.ones((4, 3), BFLOAT16))
        labels = to_library("torch", np.array([0, 0, 1, 1]))
        out = to_library("torch", np.zeros((2, 3), BFLOAT16))
        qm.merge_tokens(tokens, labels, 2, out=out)
        assert (out == 1).all()

    def test_not_into_an_input(self):
        tokens, labels = np.ones((4, 3)), np.array([0, 0, 1, 1])
        for name, call in (
            # Rows 1 and 2 of the input.
            ("tokens", lambda: qm.merge_tokens(tokens, labels, 2, out=tokens[1:3])),
            ("merged", lambda: qm.unmerge_tokens(tokens, labels, out=tokens)),
        ):
            error = f"`out` must not share memory with `{name}`"
            with pytest.raises(ValueError, match=error):
                call()

    def test_not_in_another_byte_order(self):
        # A kernel would write the bytes of every value in reverse order.
        tokens, labels = np.ones((4, 3)), np.array([0, 0, 1, 1])
        with pytest.raises(TypeError, match="`out` must be float64, got >f8"):
            qm.merge_tokens(tokens, labels, 2, out=np.ones((2, 3), ">f8"))


class Lost:
    """An array on a GPU that no longer answers."""

    def __init__(self, failure):
        self.failure = failure

    def __dlpack__(self, **options):
        raise self.failure

    def __dlpack_device__(self):
        return 1, 0  # the CPU, so that the data is read


@pytest.mark.parametrize(
    ("text", "error_type"),
    [
        # A lost GPU is a RuntimeError of its own; a TypeError would blame the
        # argument.
        ("cudaErrorIllegalAddress: an illegal memory access was encountered", None),
        ("CUDA error: an illegal memory access was encountered", None),
        ("this array is on another planet", TypeError),
    ],
)
def test_a_failure_of_the_gpu_is_not_taken_for_a_wrong_argument(text, error_type):
    with pytest.raises(error_type or RuntimeError, match=text):
        qm.norm_saliency(Lost(RuntimeError(text)))


class TestTorch:
    """What only tensors have: an autograd graph, a sign bit, memory elsewhere."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    def test_requires_grad(self, torch):
        tokens = torch.arange(8.0).reshape(4, 2).requires_grad_()
        # cosine_similarity has no gradient, so a silent detach would train nothing.
        with pytest.raises(TypeError, match=r"`tokens` requires grad.*tokens.detach"):
            qm.cosine_similarity(tokens)
        for function in (qm.cosine_similarity, qm.norm_saliency):
            with torch.no_grad():
                got = function(tokens)
            assert not got.requires_grad
            assert (got == function(tokens.detach())).all()

    def test_inference_mode(self, torch):
        with torch.inference_mode():
            assert qm.norm_saliency(torch.ones((4, 2))).shape == (4,)

    # The imaginary part of a conjugate is a view with lazily negated values: 0, -1,
    # -2, -3.
    def test_negative_bit(self, torch):
        part = torch.complex(torch.ones(4), torch.arange(4.0)).conj().imag
        assert part.is_neg()
        got = qm.select_tokens(part, 1)
        assert got.tolist() == [0]  # 0 is the largest

    def test_no_memory_and_no_dense_memory(self, torch):
        # No memory; no dense memory.
        for tokens in (torch.ones((4, 2), device="meta"), torch.eye(4).to_sparse()):
            with pytest.raises(
                TypeError, match="`tokens` cannot be read through DLPack"
            ):
                qm.norm_saliency(tokens)

    def test_bfloat16_takes_ml_dtypes(self, torch, monkeypatch):
        # None makes the import fail.
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(ImportError, match=r"`tokens` is bfloat16.*\[bfloat16\]"):
            qm.norm_saliency(torch.ones((4, 2), dtype=torch.bfloat16))

    def test_the_input_may_change_later(self, torch):
        tokens = torch.ones((4, 2))
        got = qm.unmerge_tokens(tokens, torch.arange(4))
        tokens.zero_()
        assert (got == 1).all()

    @pytest.mark.parametrize("name", ["int64", "bool", "complex64", "uint8"])
    def test_other_dtypes_cannot_be_tokens(self, torch, name):
        tokens = torch.ones((4, 2), dtype=getattr(torch, name))
        with pytest.raises(TypeError, match="`tokens` must be float16, bfloat16, fl"):
            qm.norm_saliency(tokens)


class TestJax:
    """What only JAX has: tracers, and 32 bits unless 64 are enabled."""

    @pytest.fixture
    def jax(self):
        return pytest.importorskip("jax")

    @pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
    def test_tracer(self, jax, transform):
        # A tracer has no values. The message names the way to call the function
        # anyway.
        traced = getattr(jax, transform)(lambda x: qm.cosine_similarity(x).sum())
        with pytest.raises(TypeError, match=r"`tokens` is a JAX tracer.*pure_callback"):
            traced(jax.numpy.ones((4, 2, 3)))

    def test_nothing_is_narrowed(self, jax, rng):
        assert not jax.config.jax_enable_x64  # JAX would narrow to 32 bits
        tokens = rng.standard_normal((9, 4)).astype(np.float32)
        tree = qm.linkage(jax.numpy.asarray(tokens))
        assert tree.dtype == np.float64  # a dendrogram is always float64
        np.testing.assert_array_equal(np.asarray(tree), qm.linkage(tokens))
        labels = qm.cut_linkage(tree, num_groups=3)
        np.testing.assert_array_equal(labels, qm.cluster_tokens(tokens, 3))
        assert not jax.config.jax_enable_x64

    def test_second_device(self):
        # A process of its own, because the number of devices is fixed when JAX
        # starts.
        code = (
            "import jax, qm_cupy; x = jax.device_put(jax.numpy.ones((4, 2)), "
            "jax.devices()[1]); print(qm_cupy.norm_saliency(x).device.id)"
        )
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        pytest.importorskip("jax")
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | flags,
        )
        assert done.stdout.strip() == "1"


@pytest.mark.parametrize("other", LIBRARIES[1:])
def test_mixed_libraries(other):
    mask = to_library(other, np.ones(4, bool))
    wanted = f"one library, got `tokens` of numpy, `mask` of {other}$"
    with pytest.raises(TypeError, match=wanted):
        qm.norm_saliency(np.ones((4, 2)), mask=mask)


def test_mixed_devices():
    class Producer:
        def __init__(self, device_type):
            self.device_type = device_type

        def __dlpack__(self):
            # The devices must be compared before any data is read.
            raise AssertionError("must not be read")

        def __dlpack_device__(self):
            return self.device_type, 0

    wanted = "one device, got `tokens` on the CPU, `mask` on CUDA device 0"
    with pytest.raises(ValueError, match=wanted):
        qm.norm_saliency(Producer(1), mask=Producer(2))  # 1: CPU, 2: CUDA
