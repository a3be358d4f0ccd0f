"""Hostile inputs of a language model: each error says what is wrong."""

import pickle

import numpy as np
import pytest
from llama_models import VOCABULARY, ids_of, random_model

import qm_cupy as qm

# Inputs that are right, for changes that make them wrong.
MODEL = random_model()
# Two texts of six tokens, of which one is read before.
TOKENS = MODEL.embed(ids_of(2, 6))
STATE = MODEL.read(TOKENS)[1]
# One entry of each token is NaN.
NAN = np.where(np.arange(32) == 3, np.nan, TOKENS)
# A state of another model.
OTHER = random_model(num_layers=2).read(ids_of(2, 6))[1]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        # Just above the vocabulary, below it, and larger than any int64.
        (np.array([1, 101]), ValueError, r"`ids` must lie in 0..100, got 101 at .*1,"),
        (np.array([[1], [-1]]), ValueError, r"0..100, got -1 at index \(1, 0\)"),
        # More than int64 holds.
        (np.array([2**63], np.uint64), ValueError, "0..100, got 9223372036854775808"),
        (np.array([1.0]), TypeError, "`ids` must be integers, got float64"),
        (np.array([True]), TypeError, "`ids` must be integers, got bool"),
        # An empty text.
        (np.array([], int), ValueError, "`ids` must not be empty"),
        (np.array(3), ValueError, r"`ids` must have shape \(N\) or \(B, N\), got \(\)"),
        (np.ones((1, 1, 1), int), ValueError, "`ids` must have shape"),
        # A list has no dtype, so it is refused like in every function.
        ([1, 2], TypeError, "`ids` must be an array of NumPy"),
        ("text", TypeError, "`ids` must be an array of NumPy"),
    ],
)
def test_ids(ids, error, message):
    with pytest.raises(error, match=message) as raised:
        MODEL.embed(ids)
    assert len(str(raised.value)) < 300
    # `generate` checks its text in the same way.
    with pytest.raises(error, match=message):
        MODEL.generate(ids, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        # Wrong widths, values and dtypes of tokens.
        ((TOKENS[..., :31],), {}, ValueError, "`tokens` must have width D = 32"),
        ((NAN,), {}, ValueError, r"`tokens` must be finite, got nan at index \(0, 0,"),
        # An empty text.
        ((TOKENS[:, :0],), {}, ValueError, "`tokens` must not be empty"),
        ((TOKENS > 0,), {}, TypeError, "`tokens` must be float16"),
        # A batch needs positions and sizes of each sequence.
        ((TOKENS,), {"positions": np.ones(6, int)}, ValueError, "`positions`"),
        ((TOKENS,), {"positions": np.ones((2, 6))}, TypeError, "`positions` must be"),
        ((TOKENS,), {"sizes": np.full((2, 6), -1)}, ValueError, "`sizes` must be ≥ 0"),
        ((TOKENS,), {"sizes": np.full((2, 6), np.nan)}, ValueError, "`sizes` must be"),
        ((TOKENS,), {"sizes": np.ones((2, 5))}, ValueError, "`sizes` must have shape"),
    ],
)
def test_tokens(arguments, options, error, message):
    # Both read embeddings.
    for method in (MODEL.predict, MODEL.read):
        with pytest.raises(error, match=message) as raised:
            method(*arguments, **options)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("tokens", "state", "error", "message"),
    [
        # Not a state, another batch, another model, another precision.
        (TOKENS, (1, 2), TypeError, "`state` must be a ModelState, which .* got tuple"),
        (TOKENS[:1], STATE, ValueError, "the state has B = 2 sequences, but .* 1"),
        (TOKENS, OTHER, ValueError, "is of another model: it has 2 layers"),
        (TOKENS.astype(float), STATE, TypeError, "precision of the state .float32."),
    ],
)
def test_states(tokens, state, error, message):
    with pytest.raises(error, match=message):
        MODEL.read(tokens, state)
    with pytest.raises(error, match=message):
        MODEL.step(tokens[:, 0], state)
    # A failed call leaves the state as it was.
    assert STATE.num_stored == 6
    MODEL.read(TOKENS, STATE)


@pytest.mark.parametrize(
    ("token", "options", "error", "message"),
    [
        # A whole text is not one token.
        (TOKENS, {}, ValueError, r"`token` must have shape \(D\) or \(B, D\)"),
        (TOKENS[0, 0, :5], {}, ValueError, "`token` must have width D = 32"),
        (np.arange(32), {}, TypeError, "`token` must be an embedding.*call `read`"),
        (TOKENS[:, 0], {"position": 1.5}, TypeError, "`position` must be integers"),
        (TOKENS[:, 0], {"position": np.arange(3)}, ValueError, "`position`"),
        (TOKENS[:, 0], {"size": -2}, ValueError, "`size` must be ≥ 0"),
    ],
)
def test_steps(token, options, error, message):
    with pytest.raises(error, match=message):
        MODEL.step(token, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        # How many tokens.
        ({"num_tokens": -1}, ValueError, "`num_tokens` must be ≥ 0, got -1"),
        ({"num_tokens": 1.0}, TypeError, "`num_tokens` must be an integer"),
        # The budget.
        ({"budget": 0}, ValueError, "`budget` must be at least 1 entry, or a fraction"),
        ({"budget": 1.5}, ValueError, "budget"),
        ({"budget": True}, TypeError, "budget"),
        # Options of a merge without a merge would have no effect.
        ({"every": 2}, TypeError, "`every` needs a `budget`"),
        ({"sinks": 2}, TypeError, "`sinks` needs a `budget`"),
        ({"budget": 0.5, "every": 0}, ValueError, "`every` must be at least 1"),
        ({"budget": 0.5, "sinks": -1}, ValueError, "`sinks` must be ≥ 0"),
        # The state has the queries itself.
        ({"budget": 0.5, "query": 1}, TypeError, "`query` is not an option of `merge`"),
        # Not an option at all.
        ({"foo": 1}, TypeError, "`foo` is not an option: the options of a merge are"),
        ({"budget": 0.5, "foo": 1}, TypeError, "`foo` is not an option"),
        ({"stop": -1}, ValueError, "`stop` must be ≥ 0"),
    ],
)
def test_generate(options, error, message):
    with pytest.raises(error, match=message):
        MODEL.generate(ids_of(200), **{"num_tokens": 3, **options})


def test_generate_without_work():
    ids = ids_of(2, 30).astype(np.int32)
    assert MODEL.generate(ids, 0).shape == (2, 0)
    # A text that is too short to merge stays as it is.
    wanted = MODEL.generate(ids, 4)
    np.testing.assert_array_equal(MODEL.generate(ids, 4, budget=0.25), wanted)
    np.testing.assert_array_equal(MODEL.generate(ids, 4, budget=500), wanted)
    assert wanted.dtype == np.int32


@pytest.mark.parametrize("shape", [(60,), (2, 60)])
def test_generation_after_a_state(shape):
    ids = ids_of(*shape)
    _, state = MODEL.read(ids[..., :40])
    got = MODEL.generate(ids[..., 40:], 6, state)
    np.testing.assert_array_equal(got, MODEL.generate(ids, 6))
    # A merged state, from which two texts go on.
    merged = MODEL.reread(ids[..., :40], state).merge(20, per_head=True)
    for question in (ids[..., 40:], ids[..., 50:]):
        logits, after = MODEL.read(question, merged, last_only=True)
        wanted = []
        for _ in range(6):
            wanted.append(logits.argmax(-1))
            logits, after = MODEL.read(wanted[-1], after)
        got = MODEL.generate(question, 6, merged)
        np.testing.assert_array_equal(got, np.concatenate(wanted, axis=-1))
    # A budget counts all tokens: half of 60.
    wanted = MODEL.generate(ids, 6, budget=0.5)
    np.testing.assert_array_equal(
        MODEL.generate(ids[..., 40:], 6, state, budget=0.5), wanted
    )


def test_a_batch_without_texts_is_refused():
    none = np.zeros((0, 5), np.int64)
    calls = {
        "tokens": (MODEL.read, lambda ids: MODEL.read(MODEL.embed(ids_of(2, 5))[:0])),
        "ids": (MODEL.embed, lambda ids: MODEL.generate(ids, 2)),
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=f"`{name}` must not be empty"):
                call(none)


def test_generation_after_a_wrong_state():
    _, state = MODEL.read(ids_of(2, 40))
    with pytest.raises(ValueError, match="the state has B = 2 sequences"):
        MODEL.generate(ids_of(3, 5), 2, state)
    with pytest.raises(TypeError, match="`state` must be a ModelState"):
        MODEL.generate(ids_of(2, 5), 2, 3)


def test_a_state_can_be_pickled():
    ids = ids_of(2, 40)
    _, state = MODEL.read(ids)
    for kept in (state, state.merge(20), MODEL.reread(ids, state)):
        again = pickle.loads(pickle.dumps(kept))
        for x, y in zip(MODEL.read(ids, again), MODEL.read(ids, kept), strict=True):
            if isinstance(x, np.ndarray):
                np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(again.merge(15).keys, kept.merge(15).keys)


def test_stop():
    ids = ids_of(3, 30)
    # A token that ends the first text early, and others perhaps later.
    plain = MODEL.generate(ids, 20)
    stop = int(plain[0, 4])
    got = MODEL.generate(ids, 20, stop=stop)
    for row, wanted in zip(got, plain, strict=True):
        ended = np.flatnonzero(wanted == stop)
        # A text that has not ended has all 20 tokens.
        end = ended[0] if len(ended) else 20
        np.testing.assert_array_equal(row[:end], wanted[: len(row)][:end])
        assert (row[end:] == stop).all()
    # One text ends with the token.
    alone = MODEL.generate(ids[0], 20, stop=stop)
    assert len(alone) == np.flatnonzero(plain[0] == stop)[0] + 1


def changed(change):
    """Return weights with a change, as copies."""
    weights = {name: x.copy() for name, x in MODEL.weights.items()}
    change(weights)
    return weights


def insert_nan(weights):
    weights["layers.2.self_attn.o_proj.weight"][1, 2] = np.nan


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (insert_nan, ValueError, r"layers.2.self_attn.o_proj.weight` must be finite"),
        (lambda w: w.pop("norm.weight"), ValueError, r"missing are \['norm.weight'\]"),
        # No weights at all, and one too many.
        (lambda w: w.clear(), ValueError, "`embed_tokens.weight` is missing"),
        (lambda w: w.update(extra=w["norm.weight"]), ValueError, "unknown are .'extra"),
        (
            lambda w: w.update({"layers.1.mlp.up_proj.weight": np.ones((4, 4))}),
            ValueError,
            "`layers.1.mlp.up_proj.weight` must have shape",
        ),
        (
            lambda w: w.update({"norm.weight": np.ones(32, int)}),
            TypeError,
            "`.*norm.weight.*` must be float16",
        ),
    ],
)
def test_weights(change, error, message):
    weights = changed(change)
    # The class and the state dict have the same checks.
    for make in (qm.LanguageModel, qm.LanguageModel.from_state_dict):
        with pytest.raises(error, match=message) as raised:
            make(weights, num_heads=4, num_key_heads=2)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        # Heads that do not divide each other, or are of no size.
        ({"num_heads": 3}, ValueError, "multiple of `num_key_heads` = 2, got 3"),
        ({"num_heads": 0}, ValueError, "`num_heads` must be at least 1"),
        ({"num_heads": 2.0}, TypeError, "`num_heads` must be an integer"),
        # Heads of width 1 cannot rotate.
        ({"num_heads": 32}, ValueError, "heads of an even width, got 32 rows"),
        ({"num_key_heads": 4}, ValueError, "k_proj.weight` must have shape"),
        ({"rope_base": 0}, ValueError, "`rope_base` must lie in"),
        ({"epsilon": np.nan}, ValueError, "`epsilon` must lie in"),
    ],
)
def test_settings(options, error, message):
    with pytest.raises(error, match=message):
        qm.LanguageModel(
            MODEL.weights, **{"num_heads": 4, "num_key_heads": 2, **options}
        )


@pytest.mark.parametrize(
    "options", [{"num_layers": 0}, {"mlp_dim": -1}, {"num_heads": 5}, {"seed": -1}]
)
def test_init(options):
    with pytest.raises(ValueError, match=r"at least 1|must be a multiple|must lie in"):
        qm.LanguageModel.init(VOCABULARY, 32, **{"num_heads": 4, **options})


def test_huge_embeddings_stay_finite_or_are_reported():
    """Squares of float32 overflow in a norm; the logits must not be silently NaN."""
    tokens = TOKENS.copy()
    # Its square is 1e30, and the sum of the squares is still a float32.
    tokens[0, 0, 0] = 1e15
    assert np.isfinite(MODEL.predict(tokens)).all()
