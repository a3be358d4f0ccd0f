"""`ModelState`: what it holds, and what its merge keeps."""

import dataclasses

import numpy as np
import pytest
from llama_models import VOCABULARY, ids_of, random_model

import qm_cupy as qm
from qm_cupy.language_models.state_entries import Entries, padded

MODEL = random_model()


def read(*shape, model=MODEL, seed=0):
    return model.read(ids_of(*shape, seed=seed))[1]


def positions_of(state):
    """Return the positions (L, B, H, N) by which keys were rotated."""
    pairs = zip(state.entries, state.counts, strict=True)
    return padded([x.positions[:, :, :count] for x, count in pairs])


def test_fields():
    state = read(2, 30)
    assert state.keys.shape == state.values.shape == (3, 2, 2, 30, 8)
    assert state.bias.shape == (3, 2, 2, 30)
    assert not state.bias.any()
    assert (state.num_seen, state.num_stored) == (30, 30)
    assert repr(state) == "ModelState(30 tokens, 30 entries in 3 layers, float32)"
    # The arrays are copies, so a caller cannot change a state.
    state.keys[:] = 0
    assert state.keys.any()


def test_the_attention_received_is_that_of_the_queries():
    """It is what `attention_received` computes from all queries and keys."""
    model = qm.LanguageModel.init(VOCABULARY, 16, num_heads=2, num_layers=1)
    _, state = model.read(ids_of(2, 30))
    query = state.attended.query()  # all queries, because there are fewer than 256
    assert query.shape == (1, 2, 2, 30, 8)
    wanted = qm.attention_received(query=query, key=state.keys, causal=True)
    np.testing.assert_allclose(state.attended.mean(), wanted, rtol=1e-4)
    np.testing.assert_array_equal(state.attended.counts[0, 0, 0], np.arange(30, 0, -1))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_merge_is_merge_kv_cache(per_head, per_layer):
    state = read(2, 60)
    options = {"sinks": 2, "recent": 8, "per_head": per_head, "per_layer": per_layer}
    merged = state.merge(20, **options)
    wanted = qm.merge_kv_cache(
        state.keys,
        state.values,
        20,
        query=state.attended.query(),
        attention=state.attended.mean(),
        inv_freq=10_000.0 ** -(np.arange(4) / 4),
        **options,
    )
    for name in ("keys", "values", "bias"):
        got = getattr(merged, name)
        np.testing.assert_allclose(got, getattr(wanted, name), atol=1e-5)
    assert merged.num_seen == 60
    # A layer has the length of its longest head, and no padding of other layers.
    counts = wanted.valid.sum(-1).max((1, 2))
    assert merged.counts == tuple(counts)
    assert [x.keys.shape[2] for x in merged.entries] == counts.tolist()
    assert merged.num_stored == wanted.keys.shape[-2]
    assert merged.mean_stored() == 20
    assert repr(merged).startswith("ModelState(60 tokens, 20 entries on average in 3")
    # The attention of a merged entry is that of its members.
    total = state.attended.received.sum(axis=-1)
    np.testing.assert_allclose(merged.attended.received.sum(-1), total, rtol=1e-4)
    # Its count is the largest one of them: the first entry is a sink.
    first = merged.attended.counts[..., 0]
    np.testing.assert_array_equal(first, np.full(first.shape, 60))


def test_positions_of_new_tokens_continue_from_the_tokens_seen():
    """If all entries that merge are equal, the merge changes no logit."""
    model, ids = MODEL, ids_of(40)
    _, state = model.read(ids)
    merged = state.merge(39, sinks=0, recent=2, per_layer=False)
    assert merged.num_stored == 39
    assert merged.next_position == 40
    # One pair of 40 entries merged, so the next logits hardly change. With position 39
    # of the shorter cache they change more.
    new = ids_of(6, seed=1)
    wanted, _ = model.read(new, state)
    got, after = model.read(new, merged)
    shifted, _ = model.read(new, merged, positions=np.arange(39, 45))
    assert after.num_seen == 46
    near, far = (np.abs(x - wanted).mean() for x in (got, shifted))
    assert near < 0.8 * far


def test_a_merge_of_duplicates_is_exact():
    """Equal tokens at one position have equal keys and values in every layer."""
    model, ids = MODEL, np.repeat(ids_of(10), 3)
    tokens, positions = model.embed(ids), np.repeat(np.arange(10), 3)
    # Only the first of three counts, so all three attend to the same tokens: the size
    # of the others is tiny.
    sizes = np.tile([1.0, 1e-30, 1e-30], 10).astype(np.float32)
    _, state = model.read(tokens, positions=positions, sizes=sizes)
    new = ids_of(5, seed=1)
    wanted, _ = model.read(new, state)
    merged = state.merge(10, sinks=0, recent=0, calibrate=False)
    assert merged.num_stored == 10
    np.testing.assert_allclose(merged.bias, 0, atol=1e-5)
    got, after = model.read(new, merged)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert after.num_stored == 15
    # Three that count are one entry of bias log 3.
    first, _ = model.read(tokens[:3], positions=np.zeros(3, int))[1], None
    one = first.merge(1, sinks=0, recent=0)
    np.testing.assert_allclose(one.bias, np.log(3), atol=1e-5)
    np.testing.assert_allclose(
        model.read(new, one)[0], model.read(new, first)[0], atol=1e-4
    )


def test_a_state_does_not_change_when_it_is_merged_or_read():
    state = read(2, 50)
    before = state.keys, state.bias, state.attended.mean()
    merged = state.merge(0.5)
    stored = merged.keys, merged.bias, merged.attended.mean()
    MODEL.read(ids_of(2, 9), state)
    MODEL.read(ids_of(2, 9), merged)
    after = state.keys, state.bias, state.attended.mean()
    now = merged.keys, merged.bias, merged.attended.mean()
    for x, y in zip(before + stored, after + now, strict=True):
        np.testing.assert_array_equal(x, y)
    assert merged.mean_stored() == 25


def test_layers_of_different_lengths_are_read_as_padded_ones():
    """A layer has no padding, and new tokens follow its last entry."""
    ids, more = ids_of(2, 60), ids_of(2, 7, seed=1)
    budgets = np.array([10, 50, 30])[:, None, None]
    _, state = MODEL.read(ids)
    merged = state.merge(budgets, sinks=2, recent=4)
    assert merged.counts == (10, 50, 30)
    logits, after = MODEL.read(more, merged)
    assert after.counts == (17, 57, 37)
    # The same, where each layer is as long as the longest: a merge of the layers one by
    # one, and padding of bias -inf in front of the new tokens.
    longest = max(merged.counts)
    absent = np.zeros((2, 2, longest, 8), np.float32)
    fills = {"keys": 0, "values": 0, "bias": -np.inf, "positions": 0}

    def lengthened(layer, count, name):
        part = getattr(layer, name)[:, :, :count]
        other = absent if part.ndim > 3 else absent[..., 0].astype(part.dtype)
        return padded([part, other], fills[name])[0]

    entries = tuple(
        Entries(*(lengthened(*pair, name) for name in fills), longest)
        for pair in zip(merged.entries, merged.counts, strict=True)
    )
    long = dataclasses.replace(merged, entries=entries, counts=(longest,) * 3)
    wanted, _ = MODEL.read(more, long)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    # The new tokens have received attention from themselves and later ones only.
    counts = after.attended.counts
    for layer, count in enumerate(merged.counts):
        new = counts[layer, 0, 0, count : count + 7]
        np.testing.assert_array_equal(new, np.arange(7, 0, -1))
        assert not counts[layer, 0, 0, count + 7 :].any()
        assert not after.attended.received[layer, 0, 0, count + 7 :].any()
    # Another merge has the same mean.
    assert after.merge(20).mean_stored() == 20


@pytest.mark.parametrize("rotate_at", ["mean", "first", "last"])
def test_merges_that_follow_each_other(rotate_at):
    """Entries keep the position to which they were rotated."""
    state = read(2, 90)
    # Merge, read on, and merge what was merged.
    for round_ in range(3):
        state = state.merge(30, rotate_at=rotate_at, per_head=bool(round_ % 2))
        valid = state.bias > -np.inf
        positions = positions_of(state)
        assert (positions[valid] >= 0).all()
        assert (positions[valid] < state.num_seen).all()
        # Each entry counts for the tokens in it.
        logits, state = MODEL.read(ids_of(2, 40, seed=round_), state)
        assert np.isfinite(logits).all()
    assert state.num_seen == 210
    # Padded entries stay without attention.
    absent = state.bias == -np.inf
    assert not state.attended.received[absent].any()


def test_budgets_of_layers_and_errors():
    state = read(60)
    by_layer = np.array([20, 30, 40])[:, None, None]
    # Layers with fewer entries are padded.
    merged = state.merge(by_layer)
    counts = (merged.bias > -np.inf).sum(axis=-1)
    np.testing.assert_array_equal(counts, np.broadcast_to(by_layer, counts.shape))
    # One budget of all layers is their mean.
    assert state.merge(by_layer, per_layer=True).mean_stored() == 30
    limited = state.merge(max_error=0.05, recent=8)
    assert 12 < limited.mean_stored() <= 60


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((61,), {}, ValueError, r"`budget` must lie in 1..60"),
        ((0,), {}, ValueError, r"`budget`"),
        ((1.5,), {}, ValueError, r"budget"),
        ((), {}, ValueError, r"budget"),
        ((20,), {"bias": 1}, TypeError, "`bias` is not an option of `merge`"),
        ((20,), {"inv_freq": 1}, TypeError, "`inv_freq` is not an option"),
        ((20,), {"perlayer": 1}, TypeError, "`perlayer` is not an option.*per_layer"),
        ((20,), {"window": 3}, ValueError, "`window` must be at least 8"),
    ],
)
def test_wrong_options(arguments, options, error, message):
    with pytest.raises(error, match=message):
        read(60).merge(*arguments, **options)


def test_a_merge_predicts_better_than_the_last_tokens_alone():
    """On a text that repeats itself, a quarter of the cache nearly suffices."""
    model = MODEL
    ids = np.concatenate([np.tile(ids_of(40), 5), ids_of(8, seed=1)])
    _, state = model.read(ids[:200])
    wanted, _ = model.read(ids[200:], state)
    merged, _ = model.read(ids[200:], state.merge(0.25))
    # The last quarter of the text, without the others.
    _, last = model.read(ids[150:200])
    alone, _ = model.read(ids[200:], last)
    assert np.abs(merged - wanted).mean() < 0.7 * np.abs(alone - wanted).mean()
