"""Every gradient of this folder against finite differences and against torch."""

import ml_dtypes
import numpy as np
import pytest
from conftest import to_library, to_numpy
from oracle_arrays import softmax
from saliency_cases import check_differences, gradient_of, results

import qm_cupy as qm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Padding on the left and in between, and a sequence without padding.
MASK = np.array([[False, True, True, False, True], [True] * 5])


def calls(rng):
    """Return for each name: operation, gradient, differentiable inputs, options."""
    attention = softmax(rng.standard_normal((2, 2, 2, 5, 5)))
    query, key = rng.standard_normal((2, 2, 2, 2, 5, 3))
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
            {"tokens": query[:, :, 0]},
            {},
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
            {"entropy": rng.random((3, 2, 5))},
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
class TestEveryProduct:
    @pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
    def test_finite_differences(self, rng, name, mask):
        function, vjp, inputs, options = calls(rng)[name]
        check_differences(rng, function, vjp, inputs, {**options, "mask": mask})

    def test_one_sequence_is_a_batch_of_one(self, rng, name):
        _, vjp, inputs, options = calls(rng)[name]
        rows = {"attention": 2, "entropy": 1}  # axes of one sequence; 2 for the others
        one = {
            k: x[(0,) * (x.ndim - rows.get(k, 2))].astype(np.float32)
            for k, x in inputs.items()
        }
        gradient = rng.standard_normal(5)
        got = results(vjp(gradient, **one, **options))
        batch = {k: x[None] for k, x in one.items()}
        wanted = results(vjp(gradient[None], **batch, **options))
        for x, y, source in zip(got, wanted, one.values(), strict=True):
            assert x.shape == source.shape
            np.testing.assert_array_equal(x, y[0])

    def test_one_token(self, rng, name):
        """The entropy of one token is always 0 and its saliency constant."""
        _, vjp, inputs, options = calls(rng)[name]
        attention = "attention" in inputs
        alone = {
            k: x[..., :1, :1] if attention else x[..., :1] if k == "entropy" else
            x[..., :1, :] for k, x in inputs.items()
        }  # fmt: skip
        function = calls(rng)[name][0]
        gradient = np.ones(function(**alone, **options).shape)
        # A constant has gradient 0.
        for got in results(vjp(gradient, **alone, **options)):
            assert not got.any()

    def test_padding_is_neither_read_nor_written(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = gradient_of(rng, function, inputs, options)
        wanted = results(vjp(gradient, **inputs, mask=MASK, **options))
        # A gradient that is NaN in padding must give the same bits.
        padded = np.broadcast_to(
            ~MASK[:, None] if gradient.ndim == 4 else ~MASK, gradient.shape
        )
        got = results(
            vjp(np.where(padded, np.nan, gradient), **inputs, mask=MASK, **options)
        )
        for x, y, source in zip(got, wanted, inputs, strict=True):
            np.testing.assert_array_equal(x, y)
            if source == "attention":  # padded rows and padded columns
                assert not x[padded].any()
                assert not np.swapaxes(x, -1, -2)[padded].any()
            elif source == "entropy":  # the batch is axis 1 of (L, B, …, N)
                assert not np.moveaxis(x, 1, -2)[..., ~MASK].any()
            else:
                assert not x[padded].any()

    def test_every_library(self, rng, name, library, dtype):
        if library == "array_api_strict" and dtype == np.float16:
            pytest.skip("array-api-strict has no 16 bits")
        function, vjp, inputs, options = calls(rng)[name]
        arrays = {k: x.astype(dtype) for k, x in inputs.items()}
        gradient = gradient_of(rng, function, arrays, options).astype(np.float32)
        options["mask"] = MASK
        wanted = results(vjp(gradient, **arrays, **options))
        converted = {
            k: to_library(library, x)
            for k, x in {"gradient": gradient, **arrays, "mask": MASK}.items()
        }
        got = results(vjp(**{**options, **converted}))
        for x, y, source in zip(got, wanted, arrays, strict=True):
            # The library and the dtype of the input, and the bits of NumPy.
            assert type(x) is type(converted[source])
            assert x.dtype == converted[source].dtype
            actual = to_numpy(x)
            assert actual.flags.c_contiguous
            assert actual.shape == arrays[source].shape
            assert actual.tobytes() == np.ascontiguousarray(y).tobytes()

    def test_bfloat16_is_float32_rounded_once(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        # Rounding intermediate results to bfloat16 too would change the last bit.
        narrow = {k: x.astype(BFLOAT16) for k, x in inputs.items()}
        wide = {k: x.astype(np.float32) for k, x in narrow.items()}
        gradient = gradient_of(rng, function, wide, options).astype(BFLOAT16)
        got = results(vjp(gradient, **narrow, **options))
        wanted = results(vjp(gradient, **wide, **options))
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == BFLOAT16
            np.testing.assert_array_equal(x, y.astype(BFLOAT16))

    def test_inputs_in_any_layout(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = gradient_of(rng, function, inputs, options)
        wanted = results(vjp(gradient, **inputs, **options))
        # Column-major inputs and a gradient with a stride of two elements.
        turned = {k: np.asfortranarray(x) for k, x in inputs.items()}
        strided = np.repeat(gradient, 2, axis=-1)[..., ::2]
        for x, y in zip(
            results(vjp(strided, **turned, **options)), wanted, strict=True
        ):
            assert x.flags.c_contiguous
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)

    def test_empty_batch(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        axis = 0 if name == "norm_saliency" else 1
        none = {k: np.take(x, [], axis) for k, x in inputs.items()}
        gradient = function(**none, **options)
        for x, y in zip(
            results(vjp(gradient, **none, **options)), none.values(), strict=True
        ):
            assert x.shape == y.shape

    def test_a_gradient_that_does_not_fit_is_refused(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = gradient_of(rng, function, inputs, options)
        axes = {2: "BN", 3: "LBN", 4: "LBHN"}[gradient.ndim]
        wanted = rf"`gradient` must have shape \({', '.join(axes)}\) = \("
        # One token too few, and one axis too many.
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

    def test_inputs_that_the_operation_refuses(self, rng, name):
        # The gradient checks the same inputs as the operation, with the same messages.
        function, vjp, inputs, options = calls(rng)[name]
        gradient = gradient_of(rng, function, inputs, options)
        last = list(inputs)[-1]
        wrong = inputs[last].copy()
        wrong[..., 0] = np.nan
        with pytest.raises(ValueError, match=f"`{last}` must be finite"):
            vjp(gradient, **{**inputs, last: wrong}, **options)
        with pytest.raises(TypeError, match=f"`{last}` must be float16, "):
            vjp(gradient, **{**inputs, last: wrong.astype(bool)}, **options)
        with pytest.raises(TypeError, match="`mask` must be boolean"):
            vjp(gradient, **inputs, mask=MASK.astype(float), **options)
        with pytest.raises(ValueError, match=r"`mask` must have shape \(B, N\)"):
            vjp(gradient, **inputs, mask=MASK[:, 1:], **options)


def plain(name, options, x):
    """Return the operation in plain torch, with all N × N scores at once."""
    torch = pytest.importorskip("torch")
    if name.startswith("attention"):
        p = x["attention"] / x["attention"].sum(-1, keepdim=True)
        return -(p * p.log()).sum(-1)
    if name.startswith(("query_key", "self_attention")):
        query = x.get("query", x.get("tokens"))
        scale = options.get("scale", query.shape[-1] ** -0.5)
        scores = query @ x.get("key", query).mT * scale
        if options.get("causal"):
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -1e4)  # a weight of e^-10000 = 0
        return torch.distributions.Categorical(logits=scores).entropy()
    if name == "norm_saliency":
        # The norms are one layer, scaled without the "1 -".
        entropy, high = x["tokens"].norm(dim=-1)[None], True
    else:
        entropy, high = x["entropy"], options.get("salient") == "high"
    if entropy.ndim == 4:
        entropy = entropy.mean(2)
    low = entropy.amin(-1, keepdim=True)
    scaled = (entropy - low) / (entropy.amax(-1, keepdim=True) - low)
    return scaled.mean(0) if high else 1 - scaled.mean(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_autograd_of_the_plain_formula(rng, name, precision):
    torch = pytest.importorskip("torch")
    _, vjp, inputs, options = calls(rng)[name]
    leaves = {k: torch.tensor(x, requires_grad=True) for k, x in inputs.items()}
    result = plain(name, options, leaves)
    gradient = rng.standard_normal(result.shape)
    wanted = torch.autograd.grad(result, leaves.values(), torch.tensor(gradient))
    # torch works in float64, so it is the reference for both precisions.
    arrays = {k: x.astype(precision) for k, x in inputs.items()}
    got = results(vjp(gradient.astype(precision), **arrays, **options))
    for x, y in zip(got, wanted, strict=True):
        tolerance = 1e-5 if precision == "float32" else 1e-12
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
