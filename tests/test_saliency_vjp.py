"""Gradients of saliency: against finite differences, torch's autograd and by hand."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_close, to_library, to_numpy

import qm_cupy as qm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MASK = np.array([[False, True, True, False, True], [True] * 5])


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def calls(rng):
    """Return, by name, an operation, its product, differentiable inputs and options."""
    attention = softmax(rng.standard_normal((2, 2, 2, 5, 5)))
    query, key = rng.standard_normal((2, 2, 2, 2, 5, 3))
    return {
        "attention": (
            qm.attention_entropy,
            qm.attention_entropy_vjp,
            {"attention": 2 * attention},
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


def results(found):
    return found if isinstance(found, tuple) else (found,)


def gradient_of(rng, function, inputs, options):
    return rng.standard_normal(function(**inputs, **options).shape)


def differences(function, name, inputs, options, gradient, step=1e-4):
    """Return the gradient of sum(gradient · result) by differences of fourth order."""
    x = inputs[name]
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):

        def loss(times, index=index):
            moved = x.copy()
            moved[index] += times * step
            result = function(**{**inputs, name: moved}, **options)
            return np.sum(gradient * result)

        near, far = loss(1) - loss(-1), loss(2) - loss(-2)
        out[index] = (8 * near - far) / (12 * step)
    return out


def check_differences(rng, function, vjp, inputs, options):
    gradient = gradient_of(rng, function, inputs, options)
    found = results(vjp(gradient, **inputs, **options))
    assert len(found) == len(inputs)
    for got, name in zip(found, inputs, strict=True):
        wanted = differences(function, name, inputs, options, gradient)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", NAMES)
class TestEveryProduct:
    @pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
    def test_finite_differences(self, rng, name, mask):
        function, vjp, inputs, options = calls(rng)[name]
        check_differences(rng, function, vjp, inputs, {**options, "mask": mask})

    def test_one_sequence_is_a_batch_of_one(self, rng, name):
        _, vjp, inputs, options = calls(rng)[name]
        rows = {"attention": 2, "entropy": 1}
        one = {
            k: x[(0,) * (x.ndim - rows.get(k, 2))].astype(np.float32)
            for k, x in inputs.items()
        }
        gradient = rng.standard_normal(5)
        got = results(vjp(gradient, **one, **options))
        batch = {k: x[None] for k, x in one.items()}
        wanted = results(vjp(gradient[None], **batch, **options))
        for x, y, given in zip(got, wanted, one.values(), strict=True):
            assert x.shape == given.shape
            np.testing.assert_array_equal(x, y[0])

    def test_one_token(self, rng, name):
        """Its entropy is 0, its saliency constant, whatever it is."""
        _, vjp, inputs, options = calls(rng)[name]
        attention = "attention" in inputs
        alone = {
            k: x[..., :1, :1] if attention else x[..., :1] if k == "entropy" else
            x[..., :1, :] for k, x in inputs.items()
        }  # fmt: skip
        function = calls(rng)[name][0]
        gradient = np.ones(function(**alone, **options).shape)
        for got in results(vjp(gradient, **alone, **options)):
            assert not got.any()

    def test_padding_is_neither_read_nor_written(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
        gradient = gradient_of(rng, function, inputs, options)
        wanted = results(vjp(gradient, **inputs, mask=MASK, **options))
        padded = np.broadcast_to(
            ~MASK[:, None] if gradient.ndim == 4 else ~MASK, gradient.shape
        )
        got = results(
            vjp(np.where(padded, np.nan, gradient), **inputs, mask=MASK, **options)
        )
        for x, y, given in zip(got, wanted, inputs, strict=True):
            np.testing.assert_array_equal(x, y)
            if given == "attention":
                assert not x[padded].any()
                assert not np.swapaxes(x, -1, -2)[padded].any()
            elif given == "entropy":
                assert not np.moveaxis(x, 1, -2)[..., ~MASK].any()
            else:
                assert not x[padded].any()

    def test_every_library(self, rng, name, library, dtype):
        if library == "array_api_strict" and dtype == np.float16:
            pytest.skip("array-api-strict has no 16 bits")
        function, vjp, inputs, options = calls(rng)[name]
        given = {k: x.astype(dtype) for k, x in inputs.items()}
        gradient = gradient_of(rng, function, given, options).astype(np.float32)
        options["mask"] = MASK
        wanted = results(vjp(gradient, **given, **options))
        there = {
            k: to_library(library, x)
            for k, x in {"gradient": gradient, **given, "mask": MASK}.items()
        }
        got = results(vjp(**{**options, **there}))
        for x, y, source in zip(got, wanted, given, strict=True):
            assert type(x) is type(there[source])
            assert x.dtype == there[source].dtype
            found = to_numpy(x)
            assert found.flags.c_contiguous
            assert found.shape == given[source].shape
            assert found.tobytes() == np.ascontiguousarray(y).tobytes()

    def test_bfloat16_is_float32_rounded_once(self, rng, name):
        function, vjp, inputs, options = calls(rng)[name]
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
        turned = {k: np.asfortranarray(x) for k, x in inputs.items()}
        every = np.repeat(gradient, 2, axis=-1)[..., ::2]
        for x, y in zip(results(vjp(every, **turned, **options)), wanted, strict=True):
            assert x.flags.c_contiguous
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)

    def test_an_empty_batch_is_a_batch(self, rng, name):
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

    def test_what_the_operation_refuses_is_refused(self, rng, name):
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
    """Return the operation as torch would be asked for it, all of N × N at once."""
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
            scores = scores.masked_fill(later, -1e4)
        return torch.distributions.Categorical(logits=scores).entropy()
    if name == "norm_saliency":
        entropy, high = x["tokens"].norm(dim=-1)[None], True
    else:
        entropy, high = x["entropy"], options.get("salient") == "high"
    if entropy.ndim == 4:
        entropy = entropy.mean(2)
    low = entropy.amin(-1, keepdim=True)
    scaled = (entropy - low) / (entropy.amax(-1, keepdim=True) - low)
    return scaled.mean(0) if high else 1 - scaled.mean(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_autograd_of_the_plain_formula(rng, name, kind):
    torch = pytest.importorskip("torch")
    _, vjp, inputs, options = calls(rng)[name]
    leaves = {k: torch.tensor(x, requires_grad=True) for k, x in inputs.items()}
    result = plain(name, options, leaves)
    gradient = rng.standard_normal(result.shape)
    wanted = torch.autograd.grad(result, leaves.values(), torch.tensor(gradient))
    given = {k: x.astype(kind) for k, x in inputs.items()}
    got = results(vjp(gradient.astype(kind), **given, **options))
    for x, y in zip(got, wanted, strict=True):
        tolerance = 1e-5 if kind == "float32" else 1e-12
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


class TestAttentionEntropy:
    def test_hand_worked(self):
        attention = np.array([[0.2, 0.8], [0.5, 0.5]])
        got = qm.attention_entropy_vjp(np.array([2.0, 3.0]), attention)
        entropy = -0.2 * np.log(0.2) - 0.8 * np.log(0.8)
        wanted = [-2 * (np.log(0.2) + entropy), -2 * (np.log(0.8) + entropy)]
        assert_close(got, [wanted, [0, 0]])

    def test_zero_probabilities_and_empty_rows_get_nothing(self, rng):
        attention = np.array([[0.0, 0.3, 0.7], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        got = qm.attention_entropy_vjp(rng.standard_normal(3), attention)
        assert not got[attention == 0].any()
        assert not got[1].any()
        assert got[2, 2] == 0
        cut = np.array([[0.3, 0.7]])
        whole = np.concatenate([cut, cut])
        wanted = qm.attention_entropy_vjp(np.ones(2), whole)[0]
        got = qm.attention_entropy_vjp(np.ones(3), attention)
        assert_close(got[0, 1:], wanted)

    def test_blocks(self, rng, dtype):
        attention = softmax(2 * rng.standard_normal((300, 300))).astype(dtype)
        gradient = rng.standard_normal(300)
        got = qm.attention_entropy_vjp(gradient, attention)
        assert got.dtype == dtype
        a = attention.astype(np.float64)
        log_p = np.log(a) - np.log(a.sum(-1, keepdims=True))
        entropy = -(np.exp(log_p) * log_p).sum(-1, keepdims=True)
        wanted = -gradient[:, None] * (log_p + entropy) / a.sum(-1, keepdims=True)
        np.testing.assert_allclose(
            got, wanted, rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-3
        )

    def test_digits_stay_where_one_entry_dominates(self):
        """Of the largest, log p + H is 2e-9, which float32 cannot find from its log."""
        attention = np.array([[1, 1e-10]] * 2)
        got = qm.attention_entropy_vjp(np.ones(2), attention.astype(np.float32))
        wanted = qm.attention_entropy_vjp(np.ones(2), attention)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
        assert abs(wanted[0, 0]) < 1e-8

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_rows_are_relative_to_their_sum(self, rng, size):
        attention = softmax(rng.standard_normal((4, 4)))
        wanted = qm.attention_entropy_vjp(np.ones(4), attention) / size
        got = qm.attention_entropy_vjp(np.ones(4), (size * attention).astype("f4"))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

    def test_too_large_for_half_is_infinite(self):
        attention = np.array([[2e-7, 6e-8], [0.5, 0.5]], np.float16)
        got = qm.attention_entropy_vjp(np.ones(2), attention)
        np.testing.assert_array_equal(got, [[-np.inf, np.inf], [0, 0]])


class TestScores:
    """Gradients through softmax(scores), which are found again band by band."""

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("num_tokens", [2, 255, 256, 257, 600])
    def test_blocks(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.query_key_entropy_vjp(gradient, query, key, causal=causal)
        wanted = dense(gradient, query, key, causal)
        for x, y in zip(got, wanted, strict=True):
            assert x.dtype == dtype
            assert_close(x, y, dtype, "stored" if dtype == np.float16 else "computed")

    @pytest.mark.parametrize("num_tokens", [255, 600])
    def test_blocks_of_self_attention(self, rng, dtype, num_tokens):
        tokens = rng.standard_normal((num_tokens, 6)).astype(dtype)
        gradient = rng.standard_normal(num_tokens)
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        wanted = np.add(*dense(gradient, tokens, tokens))
        assert_close(
            got, wanted, dtype, "stored" if dtype == np.float16 else "computed"
        )

    def test_digits_stay_where_one_score_dominates(self, rng):
        """Wide tokens look at themselves: the gradient is tiny, and still exact."""
        tokens = (2 * rng.standard_normal((300, 64))).astype(np.float32)
        gradient = rng.standard_normal(300)
        wanted = qm.self_attention_entropy_vjp(gradient, tokens.astype(np.float64))
        size = np.linalg.norm(wanted, axis=-1, keepdims=True)
        assert size.min() < 1e-5
        got = qm.self_attention_entropy_vjp(gradient, tokens)
        assert (np.abs(got - wanted) <= 2e-4 * size).all()

    def test_equal_tokens_have_the_entropy_of_all(self, rng):
        tokens = np.ones((270, 4))
        got = qm.self_attention_entropy_vjp(rng.standard_normal(270), tokens)
        np.testing.assert_allclose(got, 0, atol=1e-12)

    def test_equal_largest_scores(self, rng):
        tokens = np.ones((5, 3))
        tokens[[1, 3]] = 3
        inputs = {"tokens": tokens}
        functions = qm.self_attention_entropy, qm.self_attention_entropy_vjp
        check_differences(rng, *functions, inputs, {})

    def test_huge_values(self, rng):
        tokens = (1e25 * rng.standard_normal((280, 4))).astype(np.float32)
        got = qm.self_attention_entropy_vjp(np.ones(280), tokens)
        assert np.isfinite(got).all()
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.self_attention_entropy_vjp(np.ones(280), tokens.astype(float) * 1e200)

    def test_shapes_and_dtypes_must_agree(self, rng):
        query = rng.standard_normal((4, 3))
        with pytest.raises(ValueError, match="`key` must have shape"):
            qm.query_key_entropy_vjp(np.ones(4), query, query[:3])
        with pytest.raises(TypeError, match="`key` must be float64 like `query`"):
            qm.query_key_entropy_vjp(np.ones(4), query, query.astype(np.float32))
        with pytest.raises(ValueError, match="`scale` must lie in"):
            qm.query_key_entropy_vjp(np.ones(4), query, query, scale=0)

    def test_memory_is_linear_in_the_tokens(self, rng):
        tokens = rng.standard_normal((4096, 8)).astype(np.float32)
        peaks = [
            peak_of(qm.self_attention_entropy_vjp, np.ones(n), tokens[:n])
            for n in (1024, 2048, 4096)
        ]
        assert peaks[2] < 4096 * 4096  # bytes: a quarter of N × N
        assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)


def dense(gradient, query, key, causal=False):
    """Return the gradients of queries and keys from all N × N scores in float64."""
    q, k = query.astype(np.float64), key.astype(np.float64)
    scores = q @ k.T / np.sqrt(q.shape[-1])
    if causal:
        scores[np.triu_indices(len(q), 1)] = -np.inf
    p = softmax(scores)
    log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy = -(p * log_p).sum(-1, keepdims=True)
    slope = -gradient[:, None] * p * (log_p + entropy) / np.sqrt(q.shape[-1])
    return slope @ k, slope.T @ q


def peak_of(function, *args):
    """Return the most bytes that NumPy holds at once during a call."""
    tracemalloc.start()
    function(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


class TestSaliency:
    def test_hand_worked(self):
        """y = (0, 1, 1/4): token 2 moves itself, and both ends the other way."""
        gradient, entropy = np.array([0.0, 0.0, 8.0]), np.array([1.0, 5.0, 2.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-1.5, -0.5, 2])
        assert_close(qm.saliency_vjp(gradient, entropy), [1.5, 0.5, -2])

    def test_ties_share_alike(self):
        gradient = np.array([0.0, 0.0, 0.0, 8.0, 0.0])
        entropy = np.array([1.0, 1.0, 5.0, 2.0, 5.0])
        got = qm.saliency_vjp(gradient, entropy, salient="high")
        assert_close(got, [-0.75, -0.75, -0.25, 2, -0.25])

    def test_a_shared_extreme_is_the_mean_of_its_one_sided_slopes(self, rng):
        """Moving both of a tie together is differentiable; each gets half of that."""
        entropy, gradient = np.array([1.0, 4, 1, 2, 3]), rng.standard_normal(5)
        got = qm.saliency_vjp(gradient, entropy)
        step = np.array([1e-6, 0, 1e-6, 0, 0])
        ends = [gradient @ qm.saliency(entropy + s) for s in (step, -step)]
        assert got[0] + got[2] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
        own = -gradient / 3
        assert got[0] - own[0] == pytest.approx(got[2] - own[2])

    def test_a_constant_row_gets_nothing(self, rng):
        entropy = np.stack([np.full(4, 2.0), rng.random(4)])[:, None]  # (L, B, N)
        got = qm.saliency_vjp(np.array([[1.0, 2, 3, 4]]), entropy)
        assert not got[0].any()
        assert got[1].any()

    def test_moving_all_changes_nothing(self, rng):
        """Min–max forgets a row's place and width, so its gradient has none of them."""
        entropy, gradient = rng.random((3, 2, 7)), rng.standard_normal((2, 7))
        got = qm.saliency_vjp(gradient, entropy)
        np.testing.assert_allclose(got.sum(-1), 0, atol=1e-12)
        np.testing.assert_allclose((got * entropy).sum(-1), 0, atol=1e-12)

    def test_padding_sets_no_extreme(self):
        entropy = np.array([[5.0, 1.0, 2.0, -9.0]])
        mask = np.array([[True, True, True, False]])
        got = qm.saliency_vjp(np.array([[0, 0, 1.0, 0]]), entropy, mask=mask)
        assert_close(got, [[0.0625, 0.1875, -0.25, 0]])

    def test_unknown_word(self):
        with pytest.raises(ValueError, match='must be "low" or "high", got \'mid\''):
            qm.saliency_vjp(np.ones(3), np.ones(3), salient="mid")


class TestNormSaliency:
    def test_a_norm_of_zero_gets_nothing(self):
        tokens = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        got = qm.norm_saliency_vjp(np.array([7.0, 1.0, 0.0]), tokens)
        assert_close(got, [[0, 0], [0.06, 0.08], [-0.03, -0.04]])
        assert not qm.norm_saliency_vjp(np.ones(3), np.zeros((3, 2))).any()

    def test_the_gradient_is_along_the_token(self, rng):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        got = qm.norm_saliency_vjp(gradient, tokens)
        norms = np.linalg.norm(tokens, axis=-1)
        slope = qm.saliency_vjp(gradient, norms, salient="high")
        assert_close(got, slope[:, None] * tokens / norms[:, None])

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_no_square_overflows(self, rng, size):
        tokens, gradient = rng.standard_normal((9, 5)), rng.standard_normal(9)
        wanted = qm.norm_saliency_vjp(gradient, tokens) / size
        got = qm.norm_saliency_vjp(gradient, (tokens * size).astype(np.float32))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
