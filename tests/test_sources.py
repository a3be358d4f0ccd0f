"""The sources of saliency of `quickmerge`: their axes, tuples of layers, and errors."""

import re

import numpy as np
import pytest
from oracle_arrays import softmax

import qm_cupy as qm

L, B, H, N, D, WIDTH = 2, 3, 4, 9, 5, 6
MASK = np.arange(N) < [[N], [N - 2], [N - 4]]


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((B, N, D))


@pytest.fixture
def attention(rng):
    return softmax(rng.standard_normal((L, B, H, N, N)))


@pytest.fixture
def pair(rng):
    return rng.standard_normal((2, L, B, H, N, WIDTH))


def same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def mass_of(tokens, attention, mask=None):
    """Return the weights "attention" of one array, (B, H, N, N) or (L, B, H, N, N)."""
    received = qm.attention_received(attention, mask=mask)
    return qm.attention_mass(received, qm.attention_entropy(attention, mask=mask))


def test_one_layer_of_heads_is_not_read_as_layers(rng):
    """(B, H, N, N) with B = H: axes that are exchanged give other weights."""
    tokens = rng.standard_normal((H, N, D))
    attention = softmax(3 * rng.standard_normal((H, H, N, N)))
    for b in range(H):
        wanted = qm.quickmerge(tokens[b], 4, attention=attention[b])
        got = [x[b] for x in qm.quickmerge(tokens, 4, attention=attention)]
        same(got, wanted)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("weights", ["attention", "saliency", "mass"])
def test_layers_are_a_tuple_or_the_first_axis(tokens, attention, mask, weights):
    options = {"mask": mask, "weights": weights}
    stack = qm.quickmerge(tokens, 4, attention=attention, **options)
    same(qm.quickmerge(tokens, 4, attention=tuple(attention), **options), stack)
    one = qm.quickmerge(tokens, 4, attention=attention[1], **options)
    same(qm.quickmerge(tokens, 4, attention=(attention[1],), **options), one)
    if weights == "attention":
        np.testing.assert_array_equal(one.mass, mass_of(tokens, attention[1], mask))
        layers = attention[0], attention[1][:, :2], attention[1][:, 3]
        mixed = qm.quickmerge(tokens, 4, attention=layers, mask=mask)
        wanted = qm.attention_mass(
            qm.attention_received(layers, mask=mask),
            qm.attention_entropy(layers, mask=mask),
            mask=mask,
        )
        np.testing.assert_allclose(mixed.mass, wanted, rtol=1e-12)


@pytest.mark.parametrize("weights", ["attention", "saliency"])
def test_queries_and_keys(tokens, pair, weights):
    query, key = pair
    options = {"scale": 0.7, "causal": True, "mask": MASK, "weights": weights}
    stack = qm.quickmerge(tokens, 4, query=query, key=key, **options)
    layers = {"query": tuple(query), "key": tuple(key)}
    same(qm.quickmerge(tokens, 4, **layers, **options), stack)
    # Two key heads serve four heads of the queries.
    few = {"query": tuple(query), "key": tuple(key[:, :, :2])}
    every = {"query": query, "key": np.repeat(key[:, :, :2], 2, axis=2)}
    same(
        qm.quickmerge(tokens, 4, **few, **options),
        qm.quickmerge(tokens, 4, **every, **options),
    )


def test_scale_multiplies_the_scores(tokens, pair):
    query, key = pair[:, 0]
    scaled = qm.quickmerge(tokens, 4, query=query, key=key, scale=2.5)
    wanted = qm.quickmerge(tokens, 4, query=query * 2.5, key=key, scale=1.0)
    np.testing.assert_allclose(scaled.mass, wanted.mass, rtol=1e-12)
    default = qm.quickmerge(tokens, 4, query=query, key=key)
    same(qm.quickmerge(tokens, 4, query=query, key=key, scale=WIDTH**-0.5), default)
    assert not np.allclose(default.mass, scaled.mass)


@pytest.mark.parametrize("layered", [False, True])
def test_one_sequence_has_no_axis_of_a_batch(tokens, attention, pair, layered):
    hidden = tuple(np.stack([tokens, -tokens, tokens[::-1]]))
    query, key = pair[:, 0]
    key = key[:, :2]
    sources = [
        ({"attention": attention[0]}, {"weights": "mass"}),
        ({"attention": attention[0][:, 0]}, {}),  # (N, N)
        ({"query": query, "key": key}, {"scale": 0.3}),
        ({"query": query[:, 0], "key": key[:, 0]}, {}),
        ({"hidden_states": hidden[2]}, {}),
    ]
    if layered:
        sources = [
            ({"attention": (attention[0], attention[1][:, :1])}, {}),
            ({"query": (query, query[:, :2]), "key": (key, key)}, {}),
            ({"hidden_states": hidden}, {"weights": "mass"}),
        ]
    for arrays, options in sources:
        batch = qm.quickmerge(tokens, 4, **arrays, **options)
        for b in range(B):
            one = {
                name: tuple(y[b] for y in x) if isinstance(x, tuple) else x[b]
                for name, x in arrays.items()
            }
            same(qm.quickmerge(tokens[b], 4, **one, **options), [x[b] for x in batch])
    if not layered:  # layers of heads of one sequence are a tuple
        batch = qm.quickmerge(tokens, 4, attention=attention)
        one = qm.quickmerge(tokens[1], 4, attention=tuple(attention[:, 1]))
        same(one, [x[1] for x in batch])


def test_what_lies_under_padding_is_not_read(tokens, attention, pair):
    query, key = pair[:, 0]
    hidden = (tokens, 2 - tokens)
    for name, source in (
        ("attention", {"attention": attention[0]}),
        ("pair", {"query": query, "key": key[:, :2]}),
        ("states", {"hidden_states": hidden}),
    ):
        for weights in (None, "saliency", "mass"):
            options = {"mask": MASK.astype(np.int32), "weights": weights}
            wanted = qm.quickmerge(tokens, 3, **source, **options)
            x = tokens.copy()
            x[~MASK] = np.nan
            if name == "states":
                filled = {"hidden_states": (x, 2 - x)}
            else:
                filled = {k: y.copy() for k, y in source.items()}
                for y in filled.values():
                    rows = np.broadcast_to(~MASK[:, None], y.shape[:3])
                    y[rows] = np.nan
                    if name == "attention":
                        np.swapaxes(y, -1, -2)[rows] = np.inf
            same(qm.quickmerge(x, 3, **filled, **options), wanted)


class TestTraced:
    """With torch and JAX, tuples have the results of NumPy, and gradients."""

    @pytest.fixture
    def sources(self, tokens, attention, pair):
        query, key = pair
        return {
            "attention": {"attention": (attention[0], attention[1][:, :2])},
            "pair": {"query": tuple(query), "key": tuple(key[:, :, :2])},
            "states": {"hidden_states": (tokens, 2 - tokens[::-1])},
        }

    names = pytest.mark.parametrize("name", ["attention", "pair", "states"])
    weights = pytest.mark.parametrize("weights", [None, "mass"])

    @names
    @weights
    @pytest.mark.parametrize("compiled", [False, True])
    def test_torch(self, tokens, sources, name, weights, compiled):
        torch = pytest.importorskip("torch")
        source = sources[name]
        options = {"weights": weights, "mask": torch.from_numpy(MASK)}
        options |= {"scale": 0.7} if name == "pair" else {}
        layers = {k: tuple(torch.tensor(y) for y in x) for k, x in source.items()}
        # Only the last layer requires grad, as in a model with frozen embeddings.
        last = [x[-1].requires_grad_() for x in layers.values()]

        def call(tokens, layers):
            return qm.quickmerge(tokens, 4, **layers, **options)

        if compiled:
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        merged = call(torch.from_numpy(tokens), layers)
        options["mask"] = MASK
        wanted = qm.quickmerge(tokens, 4, **source, **options)
        for x, y in zip(merged, wanted, strict=True):
            np.testing.assert_allclose(x.detach(), y, rtol=1e-12)
        slope = torch.linspace(-1, 1, B * 4 * D).reshape(B, 4, D)
        (merged.tokens * slope).sum().backward()
        for x in last:
            assert x.grad.abs().sum() > 0
        if compiled:
            return
        x, step = last[0], torch.zeros_like(last[0])
        index = (0,) * (x.ndim - 2) + (1, 2)
        step[index] = 1e-5
        with torch.no_grad():
            ends = []
            for y in (x + step, x - step):
                first = next(iter(layers))
                moved = {**layers, first: (*layers[first][:-1], y)}
                options["mask"] = torch.from_numpy(MASK)
                result = qm.quickmerge(torch.from_numpy(tokens), 4, **moved, **options)
                ends.append((result.tokens * slope).sum())
        difference = (ends[0] - ends[1]) / 2e-5
        wanted = pytest.approx(difference.item(), rel=1e-4, abs=1e-9)
        assert x.grad[index].item() == wanted

    @names
    @weights
    def test_jax(self, tokens, sources, name, weights):
        jax = pytest.importorskip("jax")
        source = {
            k: tuple(jax.numpy.asarray(y, np.float32) for y in x)
            for k, x in sources[name].items()
        }
        x = jax.numpy.asarray(tokens, np.float32)
        options = {"weights": weights, "mask": jax.numpy.asarray(MASK)}

        def call(x, source):
            return qm.quickmerge(x, 4, **source, **options)

        merged = jax.jit(call)(x, source)
        wanted = call(x, source)
        np.testing.assert_array_equal(merged.labels, wanted.labels)
        np.testing.assert_allclose(merged.mass, wanted.mass, rtol=1e-5)
        gradient = jax.grad(lambda source: (call(x, source).tokens ** 2).sum())(source)
        for layers in gradient.values():
            assert all(abs(np.asarray(y)).sum() > 0 for y in layers)


SHAPES = [
    # tokens, sources (shapes), the error
    (
        (B, N, D),
        {"attention": (H, N, N)},
        "`attention` must have shape (B, N, N), (B, H, N, N) or (L, B, H, N, N) for "
        "`tokens` of shape (B, N, D) = (3, 9, 5), got (4, 9, 9)",
    ),
    (
        (B, N, D),
        {"attention": (B, N, N + 1)},
        "`attention` must have shape (B, N, N), (B, H, N, N) or (L, B, H, N, N) for "
        "`tokens` of shape (B, N, D) = (3, 9, 5), got (3, 9, 10)",
    ),
    (
        (B, N, D),
        {"attention": [(B, H, N, N), (L, B, H, N, N)]},
        "`attention[1]` must have shape (B, N, N) or (B, H, N, N) for `tokens` of "
        "shape (B, N, D) = (3, 9, 5), got (2, 3, 4, 9, 9)",
    ),
    (
        (N, D),
        {"attention": [(1, H, N, N)] * 2},
        "`attention[0]` must have shape (N, N) or (H, N, N) for `tokens` of shape "
        "(N, D) = (9, 5), got (1, 4, 9, 9): pass `tokens[None]`, a batch of one",
    ),
    (
        (N, D),
        {"attention": (L, 1, H, N, N)},
        "`attention` must have shape (N, N) or (H, N, N) for `tokens` of shape (N, D) "
        "= (9, 5), got (2, 1, 4, 9, 9): pass `tokens[None]`, a batch of one",
    ),
    (
        (N, D),
        {"attention": (L, H, N, N)},
        "`attention` must have shape (N, N) or (H, N, N) for `tokens` of shape (N, D) "
        "= (9, 5), got (2, 4, 9, 9): pass `tuple(attention)` if the first axis has "
        "layers, or `attention[b]` for one sequence of a batch",
    ),
    (
        (1, N, D),
        {"attention": (H, N, N)},
        "`attention` must have shape (B, N, N), (B, H, N, N) or (L, B, H, N, N) for "
        "`tokens` of shape (B, N, D) = (1, 9, 5), got (4, 9, 9): pass `tokens[0]`, one "
        "sequence",
    ),
    (
        (B, N, D),
        {"hidden_states": (L, B, N, D)},
        "`hidden_states` must have shape (B, N, D) for `tokens` of shape (B, N, D) = "
        "(3, 9, 5), got (2, 3, 9, 5): pass `tuple(hidden_states)`, a tuple of layers",
    ),
    (
        (N, D),
        {"hidden_states": (L, N, D)},
        "`hidden_states` must have shape (N, D) for `tokens` of shape (N, D) = (9, 5), "
        "got (2, 9, 5): pass `tuple(hidden_states)`, a tuple of layers",
    ),
    (
        (N, D),
        {"hidden_states": [(1, N, D)]},
        "`hidden_states[0]` must have shape (N, D) for `tokens` of shape (N, D) = "
        "(9, 5), got (1, 9, 5): pass `tokens[None]`, a batch of one",
    ),
    (
        (B, N, D),
        {"query": (B, H, N, D), "key": (B, 3, N, D)},
        "`key` must have shape (B, H, N, d) = (3, 4, 9, 5) like `query`, or a number "
        "of heads that divides H, got (3, 3, 9, 5)",
    ),
    (
        (B, N, D),
        {"query": [(B, H, N, D)], "key": [(B, N, D)]},
        "`key` must have shape (B, H, N, d) = (3, 4, 9, 5) like `query`, or a number "
        "of heads that divides H, got (3, 9, 5)",
    ),
    (
        (B, N, D),
        {"query": (B, N, D), "key": (B, N, D + 1)},
        "`key` must have shape (B, N, d) = (3, 9, 5) like `query`, got (3, 9, 6)",
    ),
]


@pytest.mark.parametrize(("tokens", "sources", "message"), SHAPES)
@pytest.mark.parametrize("traced", [False, True])
def test_wrong_shapes_are_refused(tokens, sources, message, traced):
    """Also if nothing needs the source, and for tensors that torch traces."""
    tokens = np.ones(tokens)
    sources = {
        k: tuple(map(np.ones, x)) if isinstance(x, list) else np.ones(x)
        for k, x in sources.items()
    }
    if traced:
        torch = pytest.importorskip("torch")
        tokens = torch.tensor(tokens, requires_grad=True)
        sources = {
            k: tuple(map(torch.tensor, x)) if isinstance(x, tuple) else torch.tensor(x)
            for k, x in sources.items()
        }
    for weights in (None, "uniform"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            qm.quickmerge(tokens, 2, weights=weights, **sources)
    assert len(message) < 300


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (
            lambda x: {"attention": [x, x]},
            TypeError,
            "`attention` must be an array or a tuple of layers, got a list: pass "
            "`tuple(attention)`",
        ),
        (
            lambda x: {"hidden_states": [x, x]},
            TypeError,
            "`hidden_states` must be an array or a tuple of layers, got a list: pass "
            "`tuple(hidden_states)`",
        ),
        (
            lambda x: {"attention": (None, None)},
            TypeError,
            "`attention[0]` must be an array, got None: a model returns its attention "
            'only if it is loaded with `attn_implementation="eager"`',
        ),
        (
            lambda x: {"attention": ()},
            ValueError,
            "`attention` must have at least one layer, got an empty tuple",
        ),
        (
            lambda x: {"query": (x, x), "key": x},
            TypeError,
            "`key` must be a tuple of 2 layers like `query`, got ndarray",
        ),
        (
            lambda x: {"query": (x, x), "key": (x,)},
            ValueError,
            "`key` must have 2 layers like `query`, got 1",
        ),
        (
            lambda x: {"saliency": (x, x)},
            TypeError,
            "`saliency` must be an array, got tuple",
        ),
        (
            lambda x: {"attention": (x, 3)},
            TypeError,
            "`attention[1]` must be an array, got int",
        ),
        (
            lambda x: {"attention": x, "scale": 0.5},
            ValueError,
            "`scale` applies to `query` and `key` only, got scale=0.5 without them: "
            "leave it out",
        ),
        (
            lambda x: {"query": x, "key": x, "scale": 0.0},
            ValueError,
            "`scale` must lie in (0, inf), got 0.0",
        ),
        (
            lambda x: {"query": x, "key": x, "scale": "1"},
            TypeError,
            "`scale` must be a number, got str",
        ),
    ],
)
@pytest.mark.parametrize("weights", [None, "uniform"])
def test_wrong_sources_are_refused(tokens, sources, error, message, weights):
    arguments = sources(np.ones((B, N, N)))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        qm.quickmerge(tokens, 2, weights=weights, **arguments)


def test_causal_attention_attends_to_no_later_token(tokens, attention):
    a = np.tril(attention[0])
    qm.quickmerge(tokens, 4, attention=a, causal=True)
    # Padding may attend to anything: its rows and columns are not read.
    padded = np.where(MASK[:, None, :, None], a, 1.0)
    qm.quickmerge(tokens, 3, attention=padded, mask=MASK, causal=True)
    message = r"0 after the diagonal if `causal` is True, got .* from token 0 to token"
    for wrong in (attention[0], attention, (a, attention[0])):
        with pytest.raises(ValueError, match=message):
            qm.quickmerge(tokens, 4, attention=wrong, causal=True)
    with pytest.raises(ValueError, match="`causal` applies to `attention`, or"):
        qm.quickmerge(tokens, 4, hidden_states=tokens, causal=True)


def test_layers_of_different_heads_have_the_same_bits_in_every_library(tokens):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    layers = tuple(
        rng.dirichlet(np.ones(N), (B, h, N)).astype(np.float32) for h in (4, 1)
    )
    x = tokens.astype(np.float32)
    wanted = qm.quickmerge(x, 4, attention=layers).mass
    traced = tuple(torch.tensor(y, requires_grad=True) for y in layers)
    mass = qm.quickmerge(torch.tensor(x), 4, attention=traced).mass
    np.testing.assert_array_equal(mass.detach(), wanted)
    # The mean of large entropies of several heads is finite.
    huge = np.full((1, 2, 4), 3e38, np.float32), np.ones((1, 4), np.float32)
    assert np.isfinite(qm.saliency(huge)).all()
