"""The defaults of `quickmerge`, and the work that they do without."""

import re

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm
from qm_cupy.composition import Sources, with_defaults
from qm_cupy.stages.saliency import (
    attention_entropy,
    attention_received,
    query_key_entropy,
    self_attention_entropy,
)
from qm_cupy.stages.selection import gumbel_softmax

B, N, D, L, H = 2, 12, 4, 3, 2

# What the caller passes: the names of the sources.
NOTHING, STATES, SCORES = (), ("hidden_states",), ("saliency",)
ATTENTION, PAIR = ("attention",), ("query", "key")


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((B, N, D))


@pytest.fixture
def arrays(rng):
    """Return a source of each kind, by name."""
    query, key = rng.standard_normal((2, L, B, H, N, 5))
    attention = rng.random((L, B, H, N, N)) ** 4
    return {
        "hidden_states": tuple(rng.standard_normal((L, B, N, D))),
        "attention": attention / attention.sum(-1, keepdims=True),  # rows sum to 1
        "query": query,
        "key": key,
        "saliency": rng.random((B, N)),
    }


def take(arrays, names):
    return {name: arrays[name] for name in names}


@pytest.mark.parametrize(
    # Each result is (method, weights, weighted_linkage).
    ("sources", "options", "wanted"),
    [
        # Without options, the source decides.
        (NOTHING, {}, ("average", "uniform", False)),
        (STATES, {}, ("average", "saliency", False)),
        (SCORES, {}, ("average", "saliency", False)),
        (ATTENTION, {}, ("ward", "attention", True)),
        (PAIR, {}, ("ward", "attention", True)),
        # The weights decide the method and the linkage.
        (ATTENTION, {"weights": "attention"}, ("ward", "attention", True)),
        (ATTENTION, {"weights": "uniform"}, ("average", "uniform", False)),
        (ATTENTION, {"weights": "saliency"}, ("average", "saliency", False)),
        (PAIR, {"weights": "mass"}, ("average", "mass", False)),
        (NOTHING, {"weights": "mass"}, ("average", "mass", False)),
        (NOTHING, {"weights": "saliency"}, ("average", "saliency", False)),
        (STATES, {"weights": "uniform"}, ("average", "uniform", False)),
        # A method keeps the weights, and their linkage if it can use them.
        (ATTENTION, {"method": "average"}, ("average", "attention", True)),
        (ATTENTION, {"method": "ward"}, ("ward", "attention", True)),
        (ATTENTION, {"method": "complete"}, ("complete", "attention", False)),
        (PAIR, {"method": "nearest"}, ("nearest", "attention", False)),
        (PAIR, {"method": "bipartite"}, ("bipartite", "attention", False)),
        (PAIR, {"method": "contiguous"}, ("contiguous", "attention", False)),
        (NOTHING, {"method": "ward"}, ("ward", "uniform", False)),
        (SCORES, {"method": "ward"}, ("ward", "saliency", False)),
        # What the caller says is not changed.
        (ATTENTION, {"weighted_linkage": False}, ("ward", "attention", False)),
        (NOTHING, {"weighted_linkage": True}, ("average", "uniform", True)),
        (
            SCORES,
            {"method": "ward", "weighted_linkage": True},
            ("ward", "saliency", True),
        ),
    ],
)
def test_defaults(tokens, arrays, sources, options, wanted):
    sources = take(arrays, sources)
    asked = {"method": None, "weights": None, "weighted_linkage": None} | options
    empty = dict.fromkeys(Sources._fields)
    assert with_defaults(Sources(**empty | sources), **asked) == wanted
    # A call has these defaults too: its results are those of the options written out.
    got = qm.quickmerge(tokens, 4, **sources, **options)
    words = dict(zip(asked, wanted, strict=True))
    same(got, qm.quickmerge(tokens, 4, **sources, **words))


def test_an_array_of_weights_is_as_explicit_as_a_word(tokens, arrays):
    """With the caller's weights, the linkage does not become ward, nor weighted."""
    options = {"attention": arrays["attention"], "weights": arrays["saliency"]}
    got = qm.quickmerge(tokens, 4, **options)
    np.testing.assert_array_equal(got.labels, qm.cluster_tokens(tokens, 4))
    np.testing.assert_array_equal(got.mass, arrays["saliency"])


@pytest.mark.parametrize("sources", [NOTHING, STATES, SCORES])
def test_attention_weights_need_attention(tokens, arrays, sources):
    message = '`weights="attention"` needs .*: pass `attention`, or `query` and `key`'
    with pytest.raises(ValueError, match=message):
        qm.quickmerge(tokens, 4, weights="attention", **take(arrays, sources))


def same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights(tokens, arrays, rng, masked):
    """They are the attention received times e^-entropy, each a mean over L and H."""
    mask = rng.random((B, N)) < 0.7 if masked else np.ones((B, N), bool)
    attention = arrays["attention"]
    # The sum over the rows of tokens, not of padding; (L, B, H, N)
    total = (attention * mask[:, None, :, None]).sum(-2)
    received = total.mean((0, 2)) / mask.sum(-1, keepdims=True) * mask  # (B, N)
    entropy = qm.attention_entropy(attention, mask=mask)  # (L, B, H, N)
    wanted = received * np.exp(-entropy.mean((0, 2)))
    options = {"attention": attention, "mask": mask if masked else None}
    got = qm.quickmerge(tokens, 4, **options)
    assert_close(got.mass, wanted)
    assert not got.mass[~mask].any()
    assert got.mass.any(-1).all()
    labels = qm.cluster_tokens(tokens, 4, method="ward", mass=got.mass, mask=mask)
    np.testing.assert_array_equal(got.labels, labels)
    means = qm.merge_tokens(tokens, labels, 4, mass=got.mass)
    np.testing.assert_array_equal(got.tokens, means)


def test_queries_and_keys_give_the_weights_of_their_attention(tokens, arrays):
    query, key = arrays["query"], arrays["key"]
    scores = np.exp(query @ key.swapaxes(-1, -2) / 5**0.5)
    attention = scores / scores.sum(-1, keepdims=True)
    by_scores = qm.quickmerge(tokens, 4, query=query, key=key)
    by_attention = qm.quickmerge(tokens, 4, attention=attention)
    assert_close(by_scores.mass, by_attention.mass)
    np.testing.assert_array_equal(by_scores.labels, by_attention.labels)


@pytest.mark.parametrize("sources", [ATTENTION, PAIR])
def test_one_sequence_has_the_weights_of_a_batch(tokens, arrays, sources):
    sources = take(arrays, sources)
    batch = qm.quickmerge(tokens, 4, **sources)
    one = {name: tuple(x[:, 1]) for name, x in sources.items()}  # (H, N, ...) each
    same(qm.quickmerge(tokens[1], 4, **one), [x[1] for x in batch])


class CalledError(AssertionError):
    """A function that the test forbids has run."""


@pytest.fixture
def forbid_saliency(monkeypatch):
    """Make every entropy, the attention received and the Gumbel-softmax raise.

    The references run for NumPy, in an operator of torch and in a callback of JAX.
    """

    def fail(*args, **options):
        raise CalledError

    for module, name in (
        (attention_entropy, "compute_attention_entropy"),
        (attention_entropy, "_attention_entropy_reference"),
        (attention_received, "_attention_received_reference"),
        (attention_received, "received_of_scores"),
        (query_key_entropy, "_query_key_entropy_reference"),
        (self_attention_entropy, "_self_attention_entropy_reference"),
        (gumbel_softmax, "_gumbel_softmax_reference"),
    ):
        monkeypatch.setattr(module, name, fail)


def numpy_call(tokens, **options):
    return qm.quickmerge(tokens, 4, **options)


def torch_call(tokens, **options):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(tokens).requires_grad_()
    merged = qm.quickmerge(x, 4, **tensors(torch.from_numpy, options))
    merged.tokens.sum().backward()
    return merged


def compiled_call(tokens, **options):
    torch = pytest.importorskip("torch")
    options = tensors(torch.from_numpy, options)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: qm.quickmerge(x, 4, **options), fullgraph=True, backend="aot_eager"
    )
    return compiled(torch.from_numpy(tokens))


def jit_call(tokens, **options):
    jax = pytest.importorskip("jax")
    options = tensors(jax.numpy.asarray, options)
    merged = jax.jit(lambda x: qm.quickmerge(x, 4, **options))(tokens)
    return jax.block_until_ready(merged)


def tensors(convert, options):
    return on_arrays(convert, options)


def on_arrays(function, options):
    """Return options after a function of every array, also of those in tuples."""

    def changed(x):
        if isinstance(x, tuple):
            return tuple(map(function, x))
        return function(x) if hasattr(x, "shape") else x

    return {k: changed(x) for k, x in options.items()}


calls = pytest.mark.parametrize(
    "call", [numpy_call, torch_call, compiled_call, jit_call]
)


@calls
@pytest.mark.usefixtures("forbid_saliency")
class TestNothingIsComputedInVain:
    def test_tokens_alone(self, tokens, call):
        merged = call(tokens)
        np.testing.assert_array_equal(np.asarray(merged.mass), np.ones((B, N)))

    @pytest.mark.parametrize("sources", [STATES, SCORES, ATTENTION, PAIR])
    def test_a_source_that_nothing_needs(self, tokens, arrays, call, sources):
        """Its values are not read: they are NaN."""
        options = {x: arrays[x] for x in sources}
        options = on_arrays(lambda x: np.full_like(x, np.nan), options)
        call(tokens, weights="uniform", **options)
        call(tokens, weights=arrays["saliency"], method="complete", **options)

    def test_noise_that_nothing_needs(self, tokens, call):
        call(tokens, noise_seed=3)

    # The test would prove nothing if these calls did not fail.
    @pytest.mark.parametrize(
        ("sources", "options"),
        [
            (NOTHING, {"weights": "saliency"}),
            (NOTHING, {"weights": "mass"}),
            (NOTHING, {"method": "nearest"}),
            (STATES, {}),
            (ATTENTION, {}),
            (PAIR, {}),
            (SCORES, {"weights": "mass"}),
        ],
    )
    def test_it_is_computed_where_it_is_needed(
        self, tokens, arrays, call, sources, options
    ):
        # JAX replaces the error of a callback by its own, which quotes it.
        with pytest.raises((CalledError, RuntimeError)) as raised:
            call(tokens, **take(arrays, sources), **options)
        assert "CalledError" in repr(raised.value)


@pytest.mark.parametrize(
    ("sources", "options"),
    [
        (NOTHING, {}),
        (STATES, {}),
        (SCORES, {}),
        (ATTENTION, {}),
        (PAIR, {}),
        (ATTENTION, {"method": "average"}),
        (PAIR, {"weights": "uniform"}),
        (ATTENTION, {"method": "nearest"}),
        (NOTHING, {"weights": "mass", "noise_seed": 2**63 + 1}),
        (SCORES, {"method": "nearest", "noise_seed": 5}),
        (ATTENTION, {"metric": "euclidean"}),
        (NOTHING, {"method": "bipartite", "metric": "euclidean", "step": 2}),
    ],
)
@pytest.mark.parametrize("call", [torch_call, compiled_call, jit_call])
def test_traced_calls_have_the_same_defaults(
    tokens, arrays, rng, call, sources, options
):
    # In float32, which JAX has by default. Two tokens of sequence 1 are padding.
    mask = np.arange(N) < [[N], [N - 2]]
    options = {**take(arrays, sources), **options}
    options = on_arrays(lambda x: x.astype("f"), options)
    got = call(tokens.astype(np.float32), mask=mask, **options)
    wanted = qm.quickmerge(tokens.astype(np.float32), 4, mask=mask, **options)
    for x, y in zip(got, wanted, strict=True):
        x = x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)
        assert x.dtype == y.dtype
        assert_close(x, y, np.float32)


def test_gradients_flow_through_attention_weights(tokens, arrays):
    """The gradient of the queries is that of finite differences."""
    torch = pytest.importorskip("torch")
    query, key = (torch.from_numpy(arrays[x]).requires_grad_() for x in PAIR)
    x = torch.from_numpy(tokens).requires_grad_()
    weight = torch.linspace(-1, 1, B * 4 * D).reshape(B, 4, D)

    def loss(query):
        merged = qm.quickmerge(x, 4, query=query, key=key)
        return (merged.tokens * weight).sum()

    loss(query).backward()
    assert x.grad.abs().sum() > 0
    assert key.grad.abs().sum() > 0
    step = torch.zeros_like(query)
    step[1, 0, 1, 3] = 1e-5
    with torch.no_grad():
        slope = (loss(query + step) - loss(query - step)) / 2e-5
    assert_close(query.grad[1, 0, 1, 3].sum().item(), slope.item(), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden_states", (B, N + 1, D)),
        ("hidden_states", (L, B, N, D)),  # layers are a tuple
        ("attention", (N,)),
        ("attention", (B, N, N + 1)),
        ("query", (B, N, 3)),  # the keys have another width
        ("saliency", (N,)),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_the_shape_of_an_unneeded_source_is_checked(
    tokens, arrays, name, shape, traced
):
    sources = {name: np.ones(shape)}
    if name == "query":
        sources["key"] = np.ones((B, N, 4))
    call = torch_call if traced else numpy_call
    message = "key" if name == "query" else name
    with pytest.raises(ValueError, match=rf"`{message}` must .*got "):
        call(tokens, weights="uniform", **sources)


@calls
@pytest.mark.parametrize("source", ["attention", "pair"])
def test_causal_attention(tokens, arrays, call, source):
    """Neither the first nor the last tokens weigh more because of the causal mask."""
    if source == "attention":
        attention = np.tril(arrays["attention"])
        attention /= attention.sum(-1, keepdims=True)
        inputs, entropy = {"attention": attention}, qm.attention_entropy(attention)
    else:
        inputs = {x: arrays[x].copy() for x in PAIR}
        entropy = qm.query_key_entropy(*inputs.values(), causal=True)
    received = qm.attention_received(**inputs, causal=True)
    wanted = received.mean((0, 2)) * np.exp(-entropy.mean((0, 2))) * np.arange(1, N + 1)
    got = call(tokens, **inputs, causal=True)
    assert_close(np.asarray(got.mass), wanted, np.float32)
    # `torch.compile` replaces the error by its own, which quotes it.
    with pytest.raises(Exception, match="`causal` must be True or False"):
        call(tokens, causal="yes")


@calls
@pytest.mark.parametrize("options", [{}, {"method": "bipartite", "step": 1}])
def test_metric_and_step_reach_the_clustering(tokens, call, options):
    lengths = np.logspace(0, 2, N)  # without them, both metrics give similar groups
    x = tokens * lengths[:, None]
    for metric in ("cosine", "euclidean"):
        labels = np.asarray(call(x, metric=metric, **options).labels)
        wanted = qm.cluster_tokens(x, 4, metric=metric, **options)
        np.testing.assert_array_equal(labels, wanted)
    other = qm.cluster_tokens(x, 4, **{**options, "metric": "cosine"})
    assert (labels != other).any()


@calls
def test_wrong_metrics_and_steps(tokens, call):
    # JAX replaces the error of a callback by its own, which quotes it.
    for options, message in (
        ({"metric": "manhattan"}, "`metric` must be"),
        ({"step": 3}, "`step` is for method"),
        ({"step": 0, "method": "bipartite"}, "`step` must be at least 1"),
    ):
        with pytest.raises(Exception, match=message):
            call(tokens, **options)


SAME = [{}, {"method": "ward"}, {"method": "bipartite"}, {"metric": "euclidean"}]


@pytest.mark.parametrize("options", SAME)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_document_has_the_same_bits_in_every_call(rng, options, dtype):
    """Alone, anywhere in a batch, and padded: there is no noise."""
    same_bits_in_every_call(rng, options, dtype)


@pytest.mark.parametrize("options", SAME)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_kernels_give_a_document_the_same_bits(kernels, rng, options, dtype):
    same_bits_in_every_call(rng, options, dtype)


def same_bits_in_every_call(rng, options, dtype):
    documents = [rng.standard_normal((n, 8)).astype(dtype) for n in (9, 14, 11)]
    alone = [qm.quickmerge(x, 0.4, **options) for x in documents]
    batch = qm.quickmerge(np.stack([documents[0]] * 3), 0.4, **options)
    for row in range(3):
        same([x[row] for x in batch], alone[0])
    mask = np.arange(14) < [[9], [14], [11]]
    padded = np.full((3, 14, 8), 7, dtype)
    padded[mask] = np.concatenate(documents)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = qm.quickmerge(padded[order], 0.4, mask=mask[order], **options)
        for row, b in enumerate(order):
            size, count = len(documents[b]), len(alone[b].sizes)
            cuts = (count, size, count, count, size)  # tokens, labels, sizes, ...
            parts = [x[row][:n] for x, n in zip(merged, cuts, strict=True)]
            same(parts, alone[b])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("source", ["attention", "pair"])
def test_padding_changes_no_bit_of_attention_weights(rng, source, causal):
    positions = np.sort(rng.choice(50, 33, replace=False))
    x = rng.standard_normal((33, 8)).astype(np.float32)
    query, key = rng.standard_normal((2, L, H, 33, 5)).astype(np.float32)
    attention = rng.random((L, H, 33, 33)).astype(np.float32)
    if causal:
        attention = np.tril(attention)
    mask = np.isin(np.arange(50), positions)
    padded = np.full((1, 50, 8), 7, np.float32)
    padded[0, positions] = x
    long = {"query": query, "key": key}
    alone = {name: tuple(x) for name, x in long.items()}
    for name, values in long.items():
        long[name] = np.full((L, 1, H, 50, 5), 7, np.float32)
        long[name][:, 0][:, :, positions] = values
    if source == "attention":
        alone = {"attention": tuple(attention)}
        wide = np.full((L, 1, H, 50, 50), 7, np.float32)
        wide[:, 0][:, :, positions[:, None], positions] = attention
        long = {"attention": wide}
    got = qm.quickmerge(padded, 9, mask=mask[None], causal=causal, **long)
    wanted = qm.quickmerge(x, 9, causal=causal, **alone)
    np.testing.assert_array_equal(got.mass[0, positions], wanted.mass)
    np.testing.assert_array_equal(got.tokens[0], wanted.tokens)


@pytest.mark.parametrize(
    ("sources", "options", "source_dtype", "wanted"),
    [
        (NOTHING, {}, None, "tokens"),
        (STATES, {"weights": "uniform"}, np.float64, "tokens"),
        (NOTHING, {"weights": "saliency"}, None, "tokens"),
        (NOTHING, {"weights": "mass"}, None, "tokens"),
        (STATES, {}, np.float64, "source"),
        (SCORES, {}, np.float16, "source"),
        (ATTENTION, {}, np.float64, "source"),
        (PAIR, {}, np.float32, "source"),
        (STATES, {"weights": "mass"}, np.float64, "source"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_of_the_weights(
    tokens, arrays, sources, options, source_dtype, wanted, dtype
):
    """float64 if they are computed from float64, else float32; `out` agrees."""
    x = tokens.astype(dtype)
    sources = on_arrays(lambda v: v.astype(source_dtype), take(arrays, sources))
    merged = qm.quickmerge(x, 4, **sources, **options)
    decisive = dtype if wanted == "tokens" else source_dtype
    assert merged.mass.dtype == np.result_type(decisive, np.float32)
    again = qm.quickmerge(-x, 4, **sources, **options, out=merged)
    assert again is merged
    other = merged._replace(mass=merged.mass.astype(np.complex64))
    message = re.escape(f"`out.mass` must be {merged.mass.dtype}, got complex64")
    with pytest.raises(TypeError, match=message):
        qm.quickmerge(x, 4, **sources, **options, out=other)
