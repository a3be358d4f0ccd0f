"""`merge_kv_cache(per_layer=True)`: all layers and heads have a common budget."""

import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm

INV_FREQ = 1000.0 ** -(np.arange(4) / 4)
LAYERS, BATCH, HEADS, ENTRIES = 3, 2, 2, 60


def arguments(rng):
    """Return everything that has an axis of layers, with padding in one sequence."""
    leading = LAYERS, BATCH, HEADS
    mask = np.ones((BATCH, ENTRIES), np.bool_)
    mask[1, :7] = False
    return {
        "keys": rng.standard_normal((*leading, ENTRIES, 8)),
        "values": rng.standard_normal((*leading, ENTRIES, 5)),
        "query": rng.standard_normal((LAYERS, BATCH, 2 * HEADS, 9, 8)),
        "attention": rng.random((*leading, ENTRIES)),
        "bias": rng.standard_normal((*leading, ENTRIES)),
        "positions": np.cumsum(rng.integers(1, 5, (BATCH, ENTRIES)), axis=-1),
        "mask": mask,
        "inv_freq": INV_FREQ,
        "recent": 3,
    }


def test_layers_with_similar_keys_keep_fewer_entries(rng):
    keys, values = rng.standard_normal((2, LAYERS, BATCH, HEADS, ENTRIES, 8))
    keys[1] *= 0.01
    cache = qm.merge_kv_cache(keys, values, 20, per_layer=True, recent=2)
    counts = cache.valid.sum(-1)  # (L, B, H)
    # Each sequence keeps its own budget.
    np.testing.assert_array_equal(counts.sum((0, 2)), LAYERS * HEADS * 20)
    assert (counts[1] < counts[0].min(-1, keepdims=True)).all()
    assert (counts[1] < counts[2].min(-1, keepdims=True)).all()


def test_it_is_one_layer_with_the_heads_of_all(rng):
    options = arguments(rng)
    flags = {"per_layer": True, "per_head": True}
    got = qm.merge_kv_cache(budget=0.4, **flags, **options)
    heads = {
        name: np.concatenate(list(options[name]), axis=1)  # along the axis of heads
        for name in ("keys", "values", "query", "attention", "bias")
    }
    whole = qm.merge_kv_cache(budget=0.4, per_head=True, **{**options, **heads})
    for x, y in zip(got, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(list(x), axis=1), y)


def test_sequences_do_not_depend_on_each_other(rng):
    options = arguments(rng)
    whole = qm.merge_kv_cache(budget=20, per_layer=True, **options)
    for b in range(BATCH):
        one = {
            name: x[b : b + 1] if name in ("positions", "mask") else x[:, b : b + 1]
            for name, x in options.items()
            if name not in ("inv_freq", "recent")
        }
        rest = {"inv_freq": INV_FREQ, "recent": 3}
        alone = qm.merge_kv_cache(budget=20, per_layer=True, **one, **rest)
        count = alone.keys.shape[-2]  # padded to the largest K of this sequence
        np.testing.assert_array_equal(whole.labels[:, b : b + 1], alone.labels)
        assert_close(whole.keys[:, b : b + 1, :, :count], alone.keys)
        assert_close(whole.bias[:, b : b + 1, :, :count], alone.bias)


def test_budgets_of_layers_count_by_their_mean(rng):
    options = arguments(rng)
    budget = np.array([10, 20, 30])[:, None, None]
    got = qm.merge_kv_cache(budget=budget, per_layer=True, **options)
    wanted = qm.merge_kv_cache(budget=20, per_layer=True, recent=6, **{
        name: x for name, x in options.items() if name != "recent"
    })  # fmt: skip
    np.testing.assert_array_equal(got.valid.sum((0, 2, 3)), wanted.valid.sum((0, 2, 3)))


def test_an_error_limits_all_layers_together(rng):
    options = arguments(rng)
    options["keys"][0] *= 0.01
    cache = qm.merge_kv_cache(max_error=0.2, per_layer=True, **options)
    counts = cache.valid.sum(-1)
    # The first layer has almost no part in the error, so all its free entries merge.
    assert (counts[0] < 15).all()
    assert (counts[1:] > 15).all()


@pytest.mark.parametrize("shape", [(60, 8), (2, 60, 8), (2, 2, 60, 8)])
def test_layers_are_needed(rng, shape):
    keys = rng.standard_normal(shape)
    with pytest.raises(ValueError, match=r"`per_layer=True` needs `keys` of all"):
        qm.merge_kv_cache(keys, keys, 20, per_layer=True)


def test_a_flag_is_needed(rng):
    keys = rng.standard_normal((2, 1, 2, 60, 8))
    with pytest.raises(TypeError, match="`per_layer` must be True or False"):
        qm.merge_kv_cache(keys, keys, 20, per_layer=1)
