"""Which arrays the public functions accept, and what they return for them."""

import sys

import numpy as np
import pytest
from conftest import assert_close, to_library

import qm_cupy as qm


# Lists and numbers are refused: only arrays have a dtype and a device.
@pytest.mark.parametrize("tokens", [[[1.0, 2.0]], 3.0, None, "x", range(3)])
def test_not_an_array(tokens):
    with pytest.raises(TypeError, match="`tokens` must be an array"):
        qm.quickmerge(tokens, 1)


X, PRIOR = np.ones((4, 2)), qm.MLPPrior.init(2)


# The error must name the argument that is wrong.
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("attention", lambda: qm.attention_entropy(None)),
        ("query", lambda: qm.query_key_entropy(None, X)),
        ("key", lambda: qm.query_key_entropy(X, None)),
        ("tokens", lambda: qm.self_attention_entropy(None)),
        ("entropy", lambda: qm.saliency(None)),
        ("tokens", lambda: qm.norm_saliency(None)),
        ("saliency", lambda: qm.gumbel_softmax(None)),
        ("received", lambda: qm.attention_mass(None, X)),
        ("entropy", lambda: qm.attention_mass(X, None)),
        ("saliency", lambda: qm.saliency_mass(None, X)),
        ("probabilities", lambda: qm.saliency_mass(X, None)),
        ("scores", lambda: qm.select_tokens(None, 1)),
        ("tokens", lambda: qm.norm_budget(None)),
        ("tokens", lambda: qm.cosine_similarity(None)),
        ("tokens", lambda: qm.linkage(None)),
        ("dendrogram", lambda: qm.cut_linkage(None, num_groups=1)),
        ("tokens", lambda: qm.cluster_tokens(None, 1)),
        ("tokens", lambda: qm.merge_tokens(None, X, 1)),
        ("labels", lambda: qm.merge_tokens(X, None, 1)),
        ("merged", lambda: qm.unmerge_tokens(None, X)),
        ("labels", lambda: qm.unmerge_tokens(X, None)),
        ("labels", lambda: qm.group_sizes(None, 1)),
        ("labels", lambda: qm.group_positions(None, 1)),
        ("merged", lambda: qm.alignment_loss(None, PRIOR)),
        ("tokens", lambda: PRIOR.predict(None)),
        ("merged", lambda: qm.decode(None, abs)),
        ("tokens", lambda: qm.norm_mass(None, 1)),
        ("tokens", lambda: qm.reconstruction_error(None, X)),
        ("merged", lambda: qm.reconstruction_error(X, None)),
        ("merged", lambda: qm.fidelity_loss(X, None)),
    ],
)
def test_none_is_not_an_array(name, call):
    with pytest.raises(TypeError, match=f"`{name}` must be an array"):
        call()


# A measure of one sequence is a number, but in the caller's library it has shape
# ().
@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
@pytest.mark.parametrize(
    "measure",
    [
        qm.norm_budget,
        lambda x: qm.norm_mass(x, 2),
        lambda x: qm.reconstruction_error(x, x[:2, :]),
        lambda x: qm.fidelity_loss(x, x[:2, :]),
        lambda x: qm.alignment_loss(x, PRIOR).forward,
        lambda x: qm.alignment_loss(x, PRIOR).backward,
        lambda x: qm.alignment_loss(x, PRIOR).total,
    ],
)
def test_measures_of_one_sequence(library, rng, measure):
    tokens = rng.standard_normal((5, 2))
    argument, wanted = to_library(library, tokens), measure(tokens)
    got = measure(argument)
    assert type(got) is type(argument)
    assert got.shape == ()
    assert np.asarray(got).dtype == wanted.dtype
    assert float(got) == wanted


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (qm.attention_entropy, [(3, 2, 5, 5)]),
        (qm.query_key_entropy, [(3, 2, 5, 4)] * 2),
        (qm.attention_received, [(3, 2, 5, 5)]),
        (
            lambda q, k: qm.attention_received(query=q, key=k),
            [(3, 2, 5, 4)] * 2,
        ),
        (qm.attention_mass, [(3, 2, 4, 5)] * 2),
        (qm.self_attention_entropy, [(3, 2, 5, 4)]),
        (qm.saliency, [(2, 5)]),
        (qm.saliency, [(3, 2, 4, 5)]),
        (qm.norm_saliency, [(2, 5, 4)]),
        (qm.gumbel_softmax, [(2, 5)]),
        (lambda x: qm.gumbel_softmax(x, hard=2), [(2, 5)]),
        (qm.saliency_mass, [(2, 5)] * 2),
        (lambda x: qm.select_tokens(x, 2), [(2, 5)]),
        (qm.cosine_similarity, [(2, 5, 4)]),
        (qm.linkage, [(2, 5, 4)]),
        # K = N = 5 keeps every token. A shortcut that returns its input would fail
        # here.
        (lambda x: qm.cluster_tokens(x, 5), [(2, 5, 4)]),
        (lambda x: qm.merge_tokens(x, np.tile(np.arange(5), (2, 1)), 5), [(2, 5, 4)]),
        (lambda x: qm.unmerge_tokens(x, np.tile(np.arange(5), (2, 1))), [(2, 5, 4)]),
        (qm.MLPPrior.init(4).predict, [(2, 5, 4)]),
    ],
)
def test_results_are_c_contiguous_and_fresh(rng, function, shapes):
    inputs = [np.asfortranarray(rng.random(shape)) for shape in shapes]
    got = function(*inputs)
    assert got.flags.c_contiguous
    assert not any(np.shares_memory(got, x) for x in inputs)
    assert_close(got, function(*map(np.ascontiguousarray, inputs)))


@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_, object])
def test_other_dtypes_cannot_be_tokens(dtype):
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        qm.quickmerge(np.ones((4, 2)).astype(dtype), 1)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 4, 3), ()])
def test_wrong_ndim(shape):
    with pytest.raises(
        ValueError, match=r"must have shape \(N, D\) or \(B, N, D\), got"
    ):
        qm.norm_saliency(np.ones(shape))


# An empty sequence has no mean, and a batch of width 0 no directions.
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4), (2, 4, 0)])
def test_empty(shape):
    with pytest.raises(ValueError, match="`tokens` must not be empty, got shape"):
        qm.quickmerge(np.ones(shape), 1)


def test_masked_array():
    # A masked array has a mask of its own, which would be ignored silently.
    with pytest.raises(TypeError, match="`tokens` is a NumPy masked array"):
        qm.norm_saliency(np.ma.ones((4, 2)))


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        # The numbers are DLPack's device types: 2 is CUDA, 10 is ROCm.
        (2, ImportError, "`tokens` is on a CUDA device, which needs CuPy"),
        (10, ValueError, "`tokens` must be in the memory of a CPU or a CUDA device"),
    ],
)
def test_device_that_is_not_the_cpu(monkeypatch, device, error, message):
    class Elsewhere:
        def __dlpack__(self):
            raise AssertionError("must not be read")

        def __dlpack_device__(self):
            return (device, 0)

    monkeypatch.setitem(sys.modules, "cupy", None)  # the import of CuPy fails
    with pytest.raises(error, match=message):
        qm.norm_saliency(Elsewhere())


def test_producer_of_no_known_library(rng):
    """Any object that supports DLPack is accepted; results are NumPy arrays."""

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


# NumPy computes with swapped bytes, but kernels and other libraries do not.
def test_foreign_byte_order(rng):
    tokens = rng.standard_normal((9, 4))
    np.testing.assert_array_equal(
        qm.quickmerge(tokens.astype(">f8"), 3).tokens, qm.quickmerge(tokens, 3).tokens
    )


def test_memory_map(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.standard_normal((9, 4)))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    merged = qm.quickmerge(mapped, 3).tokens
    # The result must not be a `memmap`, a subclass of NumPy's array.
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
def test_wrong_masks(mask, error, message):
    with pytest.raises(error, match=message):
        qm.quickmerge(np.ones((4, 2)), 1, mask=mask)


def test_the_error_names_the_empty_row_of_a_mask():
    mask = np.array([[True, True], [False, False]])  # sequence 1 is all padding
    with pytest.raises(ValueError, match=r"sequence \(1,\) has none"):
        qm.quickmerge(np.ones((2, 2, 3)), 1, mask=mask)


def test_check_finite_can_be_switched_off():
    tokens = np.array([[1.0], [np.nan]])
    with qm.check_finite(False):
        # Both tokens of the result are row 1 of the input, which is NaN.
        assert np.isnan(qm.unmerge_tokens(tokens, np.array([1, 1]))).all()
    with pytest.raises(ValueError, match=r"got nan at index \(1, 0\)"):
        qm.unmerge_tokens(tokens, np.array([1, 1]))


# 60000² is above the largest float16, 65504. The check for finite values must not
# add or square them in their own dtype.
def test_a_sum_that_overflows_is_not_an_infinity():
    assert qm.norm_saliency(np.full((9, 4), 60000, np.float16)).shape == (9,)
