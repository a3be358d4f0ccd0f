"""`LanguageModel.reread`: a second reading, by whose attention entries merge."""

import numpy as np
import pytest
from llama_models import ids_of, in_transformers, random_model

import qm_cupy as qm
from qm_cupy.caches import second_reading

MODEL = random_model()
INV_FREQ = 10_000.0 ** -(np.arange(4) / 4)


def largest_attention(query, keys, bias):
    """Return the largest attention (L, B, H, N) of queries (L, B, G H, T, d)."""
    heads = keys.shape[2]
    rows = query.reshape(*keys.shape[:3], -1, keys.shape[-1])  # (L, B, H, G T, d)
    assert rows.shape[3] == query.shape[2] // heads * query.shape[3]
    scores = rows @ keys.swapaxes(-1, -2) * keys.shape[-1] ** -0.5
    scores = scores + bias[..., None, :]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).max(-2)


@pytest.mark.parametrize("merged", [False, True])
def test_scores_are_the_largest_attention_of_the_text_read_again(merged):
    ids = ids_of(2, 40)
    _, state = MODEL.read(ids)
    if merged:
        state = state.merge(25, recent=4)
    again = MODEL.reread(ids, state)
    # The same tokens as new ones: their queries are the last 40.
    _, longer = MODEL.read(ids, state)
    query = longer.attended.query()[..., -40:, :]
    wanted = largest_attention(query, state.keys, state.bias)
    np.testing.assert_allclose(again.attended.largest, wanted, rtol=1e-4, atol=1e-6)
    # All of its queries, and the last 32 of the first reading, in another order. After
    # a merge, there are none of the first reading.
    ((_, picked),) = second_reading.parts_of(40)
    assert sorted(picked) == list(range(40))
    query = query[..., picked, :]
    if not merged:
        first = state.attended.query()[..., -32:, :]
        query = np.concatenate([first, query], axis=-2)
    order = second_reading.random_order(query.shape[-2])
    np.testing.assert_allclose(
        again.attended.again, query[..., order, :], rtol=1e-4, atol=1e-5
    )


def test_the_merge_uses_them():
    ids = ids_of(60)
    _, state = MODEL.read(ids)
    again = MODEL.reread(ids, state)
    assert (again.num_seen, again.num_stored) == (60, 60)
    np.testing.assert_array_equal(again.keys, state.keys)
    got = again.merge(20, recent=8, per_layer=True)
    wanted = qm.merge_kv_cache(
        state.keys, state.values, 20, query=again.attended.again, causal=False,
        attention=again.attended.largest, inv_freq=INV_FREQ, recent=8, per_layer=True,
    )  # fmt: skip
    for name in ("keys", "values", "bias"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), atol=1e-5)
    once = state.merge(20, recent=8, per_layer=True)
    assert not np.array_equal(once.bias, got.bias)
    # A merged entry keeps the largest score of its members.
    np.testing.assert_array_equal(
        got.attended.largest.max(-1), again.attended.largest.max(-1)
    )


def test_other_tokens_end_its_effect():
    ids, new = ids_of(60), ids_of(5, seed=1)
    _, state = MODEL.read(ids)
    _, plain = MODEL.read(new, state)
    _, after = MODEL.read(new, MODEL.reread(ids, state))
    for name in ("keys", "values", "bias"):
        np.testing.assert_array_equal(
            getattr(plain.merge(20), name), getattr(after.merge(20), name)
        )
    # The scores go on: those of new entries begin with 0.
    assert not after.attended.largest[..., 60:].any()
    both = MODEL.reread(new, after)
    assert (both.attended.largest[..., :60] >= after.attended.largest[..., :60]).all()
    assert both.attended.largest[..., 60:].all()


def test_parts_have_the_largest_score(monkeypatch):
    ids = ids_of(60)
    _, state = MODEL.read(ids)
    wanted = [MODEL.reread(x, state) for x in (ids[:25], ids[25:50], ids[50:])]
    monkeypatch.setattr(second_reading, "PART", 25)
    got = MODEL.reread(ids, state)
    largest = np.max([x.attended.largest for x in wanted], axis=0)
    np.testing.assert_allclose(got.attended.largest, largest, rtol=1e-5)
    assert got.attended.again.shape[-2] == 32 + 60


def test_some_queries_stand_for_all_of_a_long_text(monkeypatch):
    monkeypatch.setattr(second_reading, "NUM_AGAIN", 7)
    monkeypatch.setattr(second_reading, "PART", 25)
    ids = ids_of(60)
    _, state = MODEL.read(ids)
    assert MODEL.reread(ids, state).attended.again.shape[-2] == 32 + 7


def test_embeddings_are_read_as_their_ids():
    ids = ids_of(2, 40)
    _, state = MODEL.read(ids)
    by_ids, by_rows = MODEL.reread(ids, state), MODEL.reread(MODEL.embed(ids), state)
    np.testing.assert_array_equal(by_ids.attended.largest, by_rows.attended.largest)


@pytest.mark.parametrize("shape", [(60,), (2, 60)])
def test_generate_reads_again_before_each_merge(shape):
    ids = ids_of(*shape)
    options = {"recent": 4, "per_layer": True}
    got = MODEL.generate(ids, 9, budget=20, every=4, reread=True, recent=4)
    logits, state = MODEL.read(ids, last_only=True)
    state = MODEL.reread(ids, state).merge(20, **options)
    wanted = []
    for step in range(9):
        token = logits.argmax(-1)
        wanted.append(token)
        logits, state = MODEL.read(token, state)
        if step % 4 == 3:
            new = np.concatenate(wanted[-4:], axis=-1)
            state = MODEL.reread(new, state).merge(20, **options)
    np.testing.assert_array_equal(got, np.concatenate(wanted, axis=-1))


def test_generate_reads_short_texts_again_when_they_have_grown(monkeypatch):
    lengths = []
    reread = qm.LanguageModel.reread

    def noted(model, tokens, state):
        lengths.append(tokens.shape[-1])
        return reread(model, tokens, state)

    monkeypatch.setattr(qm.LanguageModel, "reread", noted)
    MODEL.generate(ids_of(18), 9, budget=20, every=4, reread=True, recent=4)
    assert lengths == [22, 4]


def test_transformers_cache_has_the_same_scores():
    torch = pytest.importorskip("torch")
    cache_class = pytest.importorskip("qm_cupy.transformers").MergedCache
    source = in_transformers()
    model = qm.LanguageModel.from_transformers(source)
    ids = ids_of(2, 50)
    cache = cache_class(source, 20, mass="reread", recent=4)
    with torch.no_grad():
        source(torch.from_numpy(ids), cache=cache)
    _, state = model.read(ids)
    state = model.reread(ids, state).merge(20, recent=4)
    for i, layer in enumerate(cache.layers):
        count = layer.num_stored
        assert state.counts[i] == count
        np.testing.assert_allclose(
            layer.keys, state.keys[i, :, :, :count], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            layer.bias, state.bias[i, :, :, :count], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            layer.received,
            state.attended.largest[i, :, :, :count],
            rtol=1e-3,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (ids_of(21), ValueError, "among the 20"),
        (ids_of(0), ValueError, "got"),
        (ids_of(2, 10), ValueError, "B = 1"),
        (np.full(5, 101), ValueError, "must lie in 0..100"),
        (np.ones((5, 31)), ValueError, "width D = 32"),
        (np.ones((5, 32)), TypeError, "precision of the state"),
    ],
)
def test_wrong_tokens(tokens, error, message):
    _, state = MODEL.read(ids_of(20))
    with pytest.raises(error, match=message):
        MODEL.reread(tokens, state)


def test_wrong_arguments():
    ids = ids_of(20)
    with pytest.raises(TypeError, match="`state` must be a ModelState"):
        MODEL.reread(ids, None)
    with pytest.raises(TypeError, match="`reread` must be True or False"):
        MODEL.generate(ids, 2, budget=10, reread=1)
    with pytest.raises(TypeError, match="`reread` needs a `budget`"):
        MODEL.generate(ids, 2, reread=True)
