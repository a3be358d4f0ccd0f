"""Properties of every gradient of this folder; finite differences and torch.

A vector–Jacobian product (`vjp`) is the gradient of a loss with respect to the inputs
of an operation, from its gradient with respect to the result. There are L layers, B
sequences, H heads and N tokens.
"""

import ml_dtypes
import numpy as np
import pytest
from conftest import to_library, to_numpy
from oracle_arrays import softmax
from saliency_cases import as_tuple, check_differences, random_gradient

import qm_cupy as qm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# (B, N): a sequence with padding on the left and in between, and one without padding.
MASK = np.array([[False, True, True, False, True], [True] * 5])


def calls(rng):
    """Return for each name: operation, vjp, inputs with a gradient, other arguments."""
    attention = softmax(rng.standard_normal((2, 2, 2, 5, 5)))  # (L, B, H, N, N)
    query, key = rng.standard_normal((2, 2, 2, 2, 5, 3))  # each (L, B, H, N, d)
    return {
        "attention": (
            qm.attention_entropy,
            qm.attention_entropy_vjp,
            {"attention": 2 * attention},  # rows need not have the sum 1
            {},
        ),
        "query_key": (
            qm.query_key_entropy,
            qm.query_key_entropy_vjp,
            {"query": query, "key": key},
            {},
        ),
        "query_key, causal": (
            qm.query_key_entropy,
            qm.query_key_entropy_vjp,
            {"query": query, "key": key},
            {"causal": True, "scale": 1.7},
        ),
        "self_attention": (
            qm.self_attention_entropy,
            qm.self_attention_entropy_vjp,
            {"tokens": query[0]},  # (B, H, N, d)
            {},
        ),
        "received, attention": (
            qm.attention_received,
            qm.attention_received_vjp,
            {"attention": attention},
            {},
        ),
        "received, attention, causal": (
            qm.attention_received,
            qm.attention_received_vjp,
            {"attention": attention},
            {"causal": True},
        ),
        "received, query_key": (
            qm.attention_received,
            qm.attention_received_vjp,
            {"query": query, "key": key},
            {},
        ),
        "received, query_key, causal": (
            qm.attention_received,
            qm.attention_received_vjp,
            {"query": query, "key": key},
            {"causal": True, "scale": 1.7},
        ),
        "saliency": (
            qm.saliency,
            qm.saliency_vjp,
            {"entropy": rng.random((3, 2, 4, 5))},
            {},
        ),
        "saliency, high": (
            qm.saliency,
            qm.saliency_vjp,
            {"entropy": rng.random((2, 3, 5))},  # (B, H, N)
            {"salient": "high"},
        ),
        "norm_saliency": (
            qm.norm_saliency,
            qm.norm_saliency_vjp,
            {"tokens": query[0, :, 0]},
            {},
        ),
    }


NAMES = list(calls(np.random.default_rng(0)))


@pytest.mark.parametrize("name", NAMES)
class TestEveryVjp:
    @pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
    def test_matches_finite_differences(self, rng, name, mask):
        function, vjp, inputs, options = calls(rng)[name]
        check_differences(rng, function, vjp, inputs, {**options, "mask": mask})

    def test_one_sequence_is_a_batch_of_one(self, rng, name):
        _, vjp, inputs, options = calls(rng)[name]
        # Number of axes of one sequence: (N, N) and (N,); 2 for the others, (N, D)
        axes = {"attention": 2, "entropy": 1}
        one = {
            k: x[(0,) * (x.ndim - axes.get(k, 2))].astype(np.float32)
            for k, x in inputs.items()
        }
        gradient = rng.standard_normal(5)
        got = as_tuple(vjp(gradient, **one, **options))
        batch = {k: x[None] for k, x in one.items()}
        wanted = as_tuple(vjp(gradient[None], **batch, **options))
        for x, y, source in zip(got, wanted, one.values(), strict=True):
            assert x.shape == source.shape
            np.testing.assert_array_equal(x, y[0])

    def test_one_token_has_gradient_zero(self, rng, name):
        """The results of a single token do not depend on its values."""
        _, vjp, inputs, options = calls(rng)[name]
        is_attention = "attention" in inputs
        if is_attention and vjp is qm.attention_received_vjp:
            pytest.skip("the result is the attention itself")
        one_token = {
            k: x[..., :1, :1] if is_attention else x[..., :1] if k == "entropy" else
            x[..., :1, :] for k, x in inputs.items()
        }  # fmt: skip
        function = calls(rng)[name][0]
        gradient = np.ones(function(**one_token, **options).shape)
        for got in as_tuple(vjp(gradient, **one_token, **options)):
            assert not got.any()

    def test_padding_is_neither_read_nor_written(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = random_gradient(rng, function, inputs, options)
        wanted = as_tuple(vjp(gradient, **inputs, mask=MASK, **options))
        # A gradient that is NaN in padding must give the same bits. The mask of rows
        # has the shape of the gradient.
        padded = np.broadcast_to(
            ~MASK[:, None] if gradient.ndim > 2 else ~MASK, gradient.shape
        )
        got = as_tuple(
            vjp(np.where(padded, np.nan, gradient), **inputs, mask=MASK, **options)
        )
        for x, y, source in zip(got, wanted, inputs, strict=True):
            np.testing.assert_array_equal(x, y)
            if source == "attention":  # padded rows and padded columns
                assert not x[padded].any()
                assert not np.swapaxes(x, -1, -2)[padded].any()
            elif source == "entropy":  # move B beside N: (..., H, B, N)
                assert not np.moveaxis(x, -3, -2)[..., ~MASK].any()
            else:
                assert not x[padded].any()

    def test_every_library_gives_the_bits_of_numpy(self, rng, name, library, dtype):
        if library == "array_api_strict" and dtype == np.float16:
            pytest.skip("array-api-strict has no 16 bits")
        function, vjp, inputs, options = calls(rng)[name]
        arrays = {k: x.astype(dtype) for k, x in inputs.items()}
        gradient = random_gradient(rng, function, arrays, options).astype(np.float32)
        options["mask"] = MASK
        wanted = as_tuple(vjp(gradient, **arrays, **options))
        converted = {
            k: to_library(library, x)
            for k, x in {"gradient": gradient, **arrays, "mask": MASK}.items()
        }
        got = as_tuple(vjp(**{**options, **converted}))
        for x, y, source in zip(got, wanted, arrays, strict=True):
            # A gradient has the library and the dtype of its input.
            assert type(x) is type(converted[source])
            assert x.dtype == converted[source].dtype
            actual = to_numpy(x)
            assert actual.flags.c_contiguous
            assert actual.shape == arrays[source].shape
            assert actual.tobytes() == np.ascontiguousarray(y).tobytes()

    def test_bfloat16_gives_the_float32_result_rounded_once(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        # If intermediate results were rounded to bfloat16 too, the last bit would
        # change.
        narrow = {k: x.astype(BFLOAT16) for k, x in inputs.items()}
        wide = {k: x.astype(np.float32) for k, x in narrow.items()}
        gradient = random_gradient(rng, function, wide, options).astype(BFLOAT16)
        got = as_tuple(vjp(gradient, **narrow, **options))
        wanted = as_tuple(vjp(gradient, **wide, **options))
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == BFLOAT16
            np.testing.assert_array_equal(x, y.astype(BFLOAT16))

    def test_column_major_and_strided_arrays(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = random_gradient(rng, function, inputs, options)
        wanted = as_tuple(vjp(gradient, **inputs, **options))
        # Column-major inputs and a gradient with a stride of two elements.
        column_major = {k: np.asfortranarray(x) for k, x in inputs.items()}
        strided = np.repeat(gradient, 2, axis=-1)[..., ::2]
        for x, y in zip(
            as_tuple(vjp(strided, **column_major, **options)), wanted, strict=True
        ):
            assert x.flags.c_contiguous
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)

    def test_empty_batch_has_an_empty_gradient(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        # L is before B if a result of rows, or the entropies, have four axes.
        shape = inputs.get("entropy", function(**inputs, **options)).shape
        batch_axis = 1 if len(shape) == 4 else 0
        empty = {k: np.take(x, [], batch_axis) for k, x in inputs.items()}
        gradient = function(**empty, **options)
        for x, y in zip(
            as_tuple(vjp(gradient, **empty, **options)), empty.values(), strict=True
        ):
            assert x.shape == y.shape

    def test_wrong_gradient_is_refused(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = random_gradient(rng, function, inputs, options)
        axes = {2: "BN", 3: "BHN", 4: "LBHN"}[gradient.ndim]
        wanted = rf"`gradient` must have shape \({', '.join(axes)}\) = \("
        # A gradient with one token less, and one with one more axis
        for wrong in (gradient[..., :-1], gradient[None]):
            with pytest.raises(ValueError, match=wanted):
                vjp(wrong, **inputs, **options)
        with pytest.raises(TypeError, match="`gradient` must be float16, "):
            vjp(gradient.astype(np.int64), **inputs, **options)
        with pytest.raises(
            TypeError, match="`gradient` must be an array, got NoneType"
        ):
            vjp(None, **inputs, **options)
        gradient[..., 2] = np.inf
        with pytest.raises(ValueError, match="`gradient` must be finite, got inf"):
            vjp(gradient, **inputs, **options)

    def test_wrong_inputs_are_refused(self, rng, name):
        # The vjp checks the same inputs as the operation, with the same messages.
        function, vjp, inputs, options = calls(rng)[name]
        gradient = random_gradient(rng, function, inputs, options)
        last = list(inputs)[-1]
        wrong = inputs[last].copy()
        wrong[..., 0] = np.nan
        with pytest.raises(ValueError, match=f"`{last}` must be finite"):
            vjp(gradient, **{**inputs, last: wrong}, **options)
        with pytest.raises(TypeError, match=f"`{last}` must be float16, "):
            vjp(gradient, **{**inputs, last: wrong.astype(bool)}, **options)
        with pytest.raises(TypeError, match="`mask` must be boolean"):
            vjp(gradient, **inputs, mask=MASK.astype(float), **options)
        with pytest.raises(ValueError, match=r"`mask` must have shape .*\(B, N\)"):
            vjp(gradient, **inputs, mask=MASK[:, 1:], **options)


def torch_result(name, options, x):
    """Return the result of an operation by plain torch functions of the inputs x.

    All N × N scores are in memory at once, so that torch can differentiate them.
    """
    torch = pytest.importorskip("torch")
    if name.startswith("received"):
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        allowed = causal if options.get("causal") else torch.ones_like(causal)
        if "attention" in x:
            p = x["attention"] * allowed
        else:
            scale = options.get("scale", x["query"].shape[-1] ** -0.5)
            scores = x["query"] @ x["key"].mT * scale
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return p.sum(-2) / allowed.sum(-2)
    if name.startswith("attention"):
        p = x["attention"] / x["attention"].sum(-1, keepdim=True)
        return -(p * p.log()).sum(-1)
    if name.startswith(("query_key", "self_attention")):
        query = x.get("query", x.get("tokens"))
        scale = options.get("scale", query.shape[-1] ** -0.5)
        scores = query @ x.get("key", query).mT * scale
        if options.get("causal"):
            # Mask the scores above the diagonal. Their weight is e^-10000 = 0.
            above_diagonal = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(above_diagonal, -1e4)
        return torch.distributions.Categorical(logits=scores).entropy()
    if name == "norm_saliency":
        # The norms are scaled like the entropies of one layer, without the "1 -".
        entropy, high = x["tokens"].norm(dim=-1)[None], True
    else:
        high = options.get("salient") == "high"
        entropy = x["entropy"].mean(-2)  # over the heads
        entropy = entropy if entropy.ndim == 3 else entropy[None]  # (L, B, N)
    low = entropy.amin(-1, keepdim=True)
    scaled = (entropy - low) / (entropy.amax(-1, keepdim=True) - low)
    return scaled.mean(0) if high else 1 - scaled.mean(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_matches_the_autograd_of_torch(rng, name, precision):
    torch = pytest.importorskip("torch")
    _, vjp, inputs, options = calls(rng)[name]
    leaves = {k: torch.tensor(x, requires_grad=True) for k, x in inputs.items()}
    result = torch_result(name, options, leaves)
    gradient = rng.standard_normal(result.shape)
    wanted = torch.autograd.grad(result, leaves.values(), torch.tensor(gradient))
    # torch computes in float64 here, so its gradient is exact enough for both dtypes.
    arrays = {k: x.astype(precision) for k, x in inputs.items()}
    got = as_tuple(vjp(gradient.astype(precision), **arrays, **options))
    for x, y in zip(got, wanted, strict=True):
        tolerance = 1e-5 if precision == "float32" else 1e-12
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
