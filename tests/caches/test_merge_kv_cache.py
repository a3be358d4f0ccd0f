"""`merge_kv_cache`: what merges, what attention then computes, and what is refused."""

import sys

import cache_oracle as oracle
import numpy as np
import pytest
from conftest import assert_close, to_library, to_numpy

import qm_cupy as qm

# `qm.merge_kv_cache` is the function, so the module has to be looked up.
module = sys.modules["qm_cupy.caches.merge_kv_cache"]
INV_FREQ = 1000.0 ** -(np.arange(4) / 4)
ALL = {"sinks": 0, "recent": 1}  # everything may merge except the last entry


def cache_of(rng, num_entries=60, leading=(2, 2), dim=8):
    keys = rng.standard_normal((*leading, num_entries, dim))
    return keys, rng.standard_normal((*leading, num_entries, 5))


def rotated(keys, positions, interleaved=False):
    """Rotate keys (N, d) by the oracle."""
    return oracle.rotate(keys, positions, INV_FREQ, interleaved)


class TestDuplicates:
    """Equal entries merge without loss: the output of attention stays the same."""

    @pytest.mark.parametrize("repeats", [2, 5])
    @pytest.mark.parametrize("calibrate", [False, True])
    def test_attention_stays_the_same(self, rng, repeats, calibrate):
        keys, values = cache_of(rng, 20)
        # Equal entries follow one another.
        many = [np.repeat(x, repeats, axis=-2) for x in (keys, values)]
        query = rng.standard_normal((2, 4, 6, 8))
        # One entry of the last group is recent, so it does not merge.
        cache = qm.merge_kv_cache(*many, 21, query=query, calibrate=calibrate, **ALL)
        assert cache.sizes.sum() == 4 * 20 * repeats
        # Queries that the merge has not seen.
        new = rng.standard_normal((2, 4, 3, 8))
        wanted, wanted_z = qm.attend(new, *many)
        got, z = qm.attend(new, cache.keys, cache.values, bias=cache.bias)
        assert_close(got, wanted)
        assert_close(z, wanted_z)

    def test_duplicates_in_many_windows(self, rng):
        keys, values = cache_of(rng, 50, leading=())
        # Equal entries are far apart, so windows of neighbours would not do.
        order = rng.permutation(400)
        many = [np.repeat(x, 8, axis=-2)[order] for x in (keys, values)]
        cache = qm.merge_kv_cache(*many, max_error=0.0, window=64, **ALL)
        # Equal keys have equal projections, so few of them are in two windows.
        assert len(cache.keys) <= 60
        new = rng.standard_normal((3, 8))
        got, _ = qm.attend(new, cache.keys, cache.values, bias=cache.bias)
        assert_close(got, qm.attend(new, *many)[0])

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_keys_are_compared_before_their_rotation(self, rng, interleaved):
        # Five contents, each at six positions.
        content = np.repeat(rng.standard_normal((5, 8)), 6, axis=0)
        positions = rng.permutation(100)[:30]
        keys = rotated(content, positions, interleaved)
        cache = qm.merge_kv_cache(
            keys, keys, 6, positions=positions, inv_freq=INV_FREQ,
            interleaved=interleaved, **ALL,
        )  # fmt: skip
        # Each group has equal contents; the last entry is alone.
        labels = cache.labels[:-1]
        for group in range(6):
            assert len(set(np.flatnonzero(labels == group) // 6)) <= 1
        # Without the rotation, keys of equal content are not alike.
        without = qm.merge_kv_cache(keys, keys, 6, **ALL)
        assert (without.labels != cache.labels).any()


class TestBudgets:
    @pytest.mark.parametrize("window", [8, 16, 128])
    @pytest.mark.parametrize("count", [2, 5, 20, 59, 60])
    def test_exactly_k_entries_remain(self, rng, count, window):
        keys, values = cache_of(rng)
        cache = qm.merge_kv_cache(keys, values, count, window=window, **ALL)
        assert cache.keys.shape == (2, 2, count, 8)
        assert (cache.sizes > 0).all()
        # Every entry is in one group.
        np.testing.assert_array_equal(cache.sizes.sum(-1), 60)
        # Entries are in the order of their last members.
        assert (np.diff(cache.positions, axis=-1) > 0).all()
        for index in np.ndindex(2, 2):
            for entry, position in enumerate(cache.positions[index]):
                members = np.flatnonzero(cache.labels[index] == entry)
                assert members[-1] == position

    def test_a_count_for_each_head(self, rng):
        keys, values = cache_of(rng)
        # One K for each head.
        cache = qm.merge_kv_cache(keys, values, np.array([10, 25]), **ALL)
        np.testing.assert_array_equal(cache.valid.sum(-1), [[10, 25], [10, 25]])
        assert np.isneginf(cache.bias[:, 0, 10:]).all()
        assert not cache.keys[:, 0, 10:].any()

    def test_per_head_keeps_the_sum_of_each_layer(self, rng):
        keys, values = cache_of(rng)
        keys[:, 0] *= 0.01  # these keys are alike, so this head needs few entries
        cache = qm.merge_kv_cache(keys, values, 20, per_head=True, **ALL)
        counts = cache.valid.sum(-1)
        np.testing.assert_array_equal(counts.sum(-1), 40)
        assert (counts[:, 0] < counts[:, 1]).all()

    def test_an_error_is_kept(self, rng):
        keys, values = cache_of(rng, leading=())
        previous = 61
        for limit in (0.0, 0.1, 0.5, 1.0):
            cache = qm.merge_kv_cache(keys, values, max_error=limit, **ALL)
            # Without attention, the mass is the norm of the value.
            mass = np.linalg.norm(values, axis=-1) ** 0.7
            means = np.array([
                np.average(keys[members], axis=0, weights=mass[members])
                for members in (cache.labels == k for k in range(len(cache.keys)))
            ])  # fmt: skip
            error = mass @ ((keys - means[cache.labels]) ** 2).sum(-1)
            # The last entry does not merge, so its key does not count.
            assert error <= (limit + 1e-2) * (mass[:-1] @ (keys[:-1] ** 2).sum(-1))
            assert len(cache.keys) <= previous
            previous = len(cache.keys)
        assert previous < 10


class TestEntriesThatStay:
    def test_they_keep_their_bits(self, rng):
        keys, values = cache_of(rng)
        query = rng.standard_normal((2, 4, 40, 8))
        # Position 30 is neither among the first nor among the last.
        options = {"query": query, "inv_freq": INV_FREQ, "protect": [30]}
        cache = qm.merge_kv_cache(keys, values, 20, sinks=3, recent=7, **options)
        # Three sinks, the protected entry, and seven recent ones.
        alone = [0, 1, 2, 30, *range(53, 60)]
        for index in np.ndindex(2, 2):
            entries = cache.labels[index][alone]
            assert (cache.sizes[index][entries] == 1).all()
            np.testing.assert_array_equal(
                cache.keys[index][entries], keys[index][alone]
            )
            np.testing.assert_array_equal(
                cache.values[index][entries], values[index][alone]
            )
            assert not cache.bias[index][entries].any()

    def test_rotate_at_the_first_or_last_member(self, rng):
        content = rng.standard_normal((30, 8))
        keys = rotated(content, np.arange(30))
        for where in ("first", "last"):
            cache = qm.merge_kv_cache(
                keys, np.ones((30, 2)), 8, inv_freq=INV_FREQ, rotate_at=where, **ALL
            )
            for k in range(8):
                members = np.flatnonzero(cache.labels == k)
                at = members[0 if where == "first" else -1]
                # All values have the same norm, so the means are plain.
                mean = content[members].mean(axis=0)[None]
                assert_close(cache.keys[k], rotated(mean, [at])[0])


class TestBiases:
    def test_the_last_queries_pay_an_entry_what_they_paid_its_members(self, rng):
        keys, values = cache_of(rng, leading=())
        query = rng.standard_normal((4, 8)) / 4
        cache = qm.merge_kv_cache(keys, values, 30, query=query, sinks=0, recent=20)
        # Attention of the queries to the original cache.
        _, z = qm.attend(query, keys, values, causal=True)
        scale = 8**-0.5
        attention = np.exp(query @ keys.T * scale - z[:, None])
        # Query i is that of entry 56 + i.
        attention *= np.arange(60) <= 56 + np.arange(4)[:, None]
        # Attention to the merged entries, relative to the same sum.
        merged = np.exp(query @ cache.keys.T * scale + cache.bias - z[:, None])
        for k in np.flatnonzero(cache.sizes > 1):
            members = cache.labels == k
            assert_close(merged[:, k].sum(), attention[:, members].sum())

    def test_biases_add_up(self, rng):
        keys, values = cache_of(rng, leading=())
        bias = rng.standard_normal(60)
        cache = qm.merge_kv_cache(keys, values, 12, bias=bias, **ALL)
        for k in range(12):
            # log of the sum of e^b over the members.
            wanted = np.log(np.exp(bias[cache.labels == k]).sum())
            assert_close(cache.bias[k], wanted)


class TestQueriesOfAnotherText:
    """`causal=False`: all queries attend to all entries."""

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("attention", [False, True])
    @pytest.mark.parametrize("num_queries", [12, 300])  # also more than entries
    def test_they_are_causal_queries_of_absent_entries(
        self, rng, monkeypatch, masked, attention, num_queries
    ):
        # test_other_queries.py tests what else differs: the powers, and the weights of
        # heads with `attention`.
        monkeypatch.setattr(module, "_POWER_AGAIN", module._LINKAGE_POWER)
        keys, values = cache_of(rng)
        query = rng.standard_normal((2, 4, num_queries, 8))
        received = rng.random((2, 2, 60)) if attention else None
        mask = None
        if masked:
            mask = np.ones((2, 60), bool)
            mask[0, [0, 1, 2, 30, 58]] = False
        options = {"inv_freq": INV_FREQ, "sinks": 1, "recent": 5}
        options["per_head"] = not attention
        got = qm.merge_kv_cache(
            keys, values, 20, query=query, causal=False, attention=received, mask=mask,
            **options,
        )  # fmt: skip
        # Entries that nothing attends to follow the others, and have the queries.
        more = np.ones((2, 2, num_queries, 13))
        long_keys = np.concatenate([keys, more[..., :8]], -2)
        long_values = np.concatenate([values, more[..., :5]], -2)
        bias = np.zeros((2, 2, 60 + num_queries))
        bias[..., 60:] = -np.inf
        if masked:
            mask = np.concatenate([mask, np.ones((2, num_queries), bool)], -1)
        if attention:
            received = np.concatenate([received, more[..., 0]], -1)
        wanted = qm.merge_kv_cache(
            long_keys, long_values, 20, query=query, attention=received, bias=bias,
            mask=mask, **options,
        )  # fmt: skip
        np.testing.assert_array_equal(got.labels, wanted.labels[..., :60])
        assert_close(got.keys, wanted.keys)
        assert_close(got.values, wanted.values)
        assert_close(got.bias, wanted.bias)

    def test_as_many_queries_as_entries_are_not_their_own(self, rng):
        keys, values = cache_of(rng)
        query = rng.standard_normal((2, 4, 60, 8))
        options = {"query": query, "inv_freq": INV_FREQ}
        own = qm.merge_kv_cache(keys, values, 20, **options)
        other = qm.merge_kv_cache(keys, values, 20, causal=False, **options)
        assert not np.array_equal(own.labels, other.labels)
        # Only the last 32 count; without a budget of several heads, no others.
        last = {**options, "query": query[:, :, -32:]}
        again = qm.merge_kv_cache(keys, values, 20, causal=False, **last)
        for x, y in zip(other, again, strict=True):
            np.testing.assert_array_equal(x, y)


class TestParts:
    def test_padding_has_the_result_of_removing_it(self, rng):
        keys, values = cache_of(rng)
        mask = np.ones((2, 60), bool)
        mask[0, :7] = mask[1, 50:] = False
        # No value under the padding may be read.
        keys[0, :, :7], values[1, :, 50:] = np.nan, np.inf
        cache = qm.merge_kv_cache(keys, values, 20, inv_freq=INV_FREQ, mask=mask, **ALL)
        for b in range(2):
            one = qm.merge_kv_cache(
                *(x[b : b + 1][..., mask[b], :] for x in (keys, values)), 20,
                inv_freq=INV_FREQ, positions=np.flatnonzero(mask[b]), **ALL,
            )  # fmt: skip
            np.testing.assert_array_equal(cache.labels[b][:, mask[b]], one.labels[0])
            assert (cache.labels[b][:, ~mask[b]] == -1).all()
            assert_close(cache.keys[b], one.keys[0])

    @pytest.mark.parametrize("window", [8, 128])
    def test_a_batch_has_the_bits_of_its_sequences(self, rng, window):
        keys, values = cache_of(rng)
        query = rng.standard_normal((2, 4, 60, 8))
        options = {"inv_freq": INV_FREQ, "window": window, **ALL}
        whole = qm.merge_kv_cache(keys, values, 20, query=query, **options)
        for b in range(2):
            part = slice(b, b + 1)
            args = keys[part], values[part], 20
            one = qm.merge_kv_cache(*args, query=query[part], **options)
            for x, y in zip(whole, one, strict=True):
                np.testing.assert_array_equal(x[part], y)

    def test_layers_are_merged_alone(self, rng):
        keys, values = cache_of(rng, leading=(3, 2, 2))
        whole = qm.merge_kv_cache(keys, values, 20, per_head=True, **ALL)
        for layer in range(3):
            one = qm.merge_kv_cache(
                keys[layer], values[layer], 20, per_head=True, **ALL
            )
            # Alone, a layer is not padded to the largest of all layers.
            count = one.keys.shape[-2]
            np.testing.assert_array_equal(whole.keys[layer][..., :count, :], one.keys)

    def test_results_are_in_the_library_of_the_input(self, rng, library):
        keys, values = (x.astype(np.float32) for x in cache_of(rng))
        arrays = [to_library(library, x) for x in (keys, values)]
        cache = qm.merge_kv_cache(*arrays, 0.3, inv_freq=INV_FREQ)
        wanted = qm.merge_kv_cache(keys, values, 0.3, inv_freq=INV_FREQ)
        for x, y in zip(cache, wanted, strict=True):
            assert type(x) is type(arrays[0])
            np.testing.assert_array_equal(to_numpy(x), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"budget": None},
            ValueError,
            "exactly one of `budget` and `max_error`, got none",
        ),
        ({"max_error": 0.1}, ValueError, "`max_error`, got both"),
        # Keys of shape (B, N, H, d): the heads seem to be entries.
        (
            {
                "keys": np.ones((1, 60, 3, 8)),
                "values": np.ones((1, 60, 3, 8)),
                "budget": 2,
            },
            ValueError,
            r"The heads have N = 3 entries: is the layout \(\.\.\., H, N, d\)",
        ),
        ({"budget": 61}, ValueError, "`budget` must lie in 1..60"),
        ({"budget": 0}, ValueError, "`budget` must be at least 1 entry, or a fraction"),
        ({"budget": 1.5}, ValueError, "must lie in"),
        ({"budget": True}, TypeError, "`budget` must be"),
        ({"budget": np.array([3, 4, 5])}, ValueError, "must broadcast to the axes"),
        ({"budget": 6, "sinks": 4, "recent": 2}, ValueError, "must be at least 7"),
        ({"sinks": -1}, ValueError, "`sinks` must be ≥ 0"),
        ({"recent": 1.0}, TypeError, "`recent` must be an integer"),
        ({"window": 7}, ValueError, "`window` must be at least 8"),
        ({"rotate_at": "first"}, ValueError, "needs `inv_freq`"),
        ({"rotate_at": "middle"}, ValueError, "`rotate_at` must be"),
        ({"interleaved": True}, ValueError, "need `inv_freq`"),
        ({"inv_freq": np.ones(5)}, ValueError, "r ≤ d = 8"),
        ({"inv_freq": "rope"}, TypeError, "`inv_freq` must be"),
        ({"inv_freq": [np.nan]}, ValueError, "`inv_freq` must be finite"),
        ({"query": np.ones((2, 3, 4, 8))}, ValueError, "`query` must have shape"),
        ({"query": np.ones((2, 2, 61, 8))}, ValueError, "last T ≤ N = 60"),
        ({"attention": -np.ones((2, 2, 60))}, ValueError, "`attention` must be ≥ 0"),
        ({"attention": np.ones((2, 2, 59))}, ValueError, "`attention` must have"),
        ({"positions": np.ones(60)}, TypeError, "`positions` must be integers"),
        ({"positions": np.arange(59)}, ValueError, "`positions` must have shape"),
        ({"bias": np.full((2, 2, 60), np.nan)}, ValueError, "finite or -inf"),
        ({"calibrate": 1}, TypeError, "`calibrate` must be True or False"),
        ({"causal": None}, TypeError, "`causal` must be True or False"),
        ({"keys": np.full((2, 2, 60, 8), 1e200)}, ValueError, "must lie within"),
        ({"keys": np.zeros((2, 2, 0, 8))}, ValueError, "must not be empty"),
        # A batch without sequences.
        (
            {"keys": np.zeros((0, 2, 60, 8)), "values": np.zeros((0, 2, 60, 5))},
            ValueError,
            "`keys` must not be empty",
        ),
        ({"keys": [np.zeros((2, 60, 8))] * 3}, TypeError, "list: make one array of it"),
        ({"values": np.zeros((2, 60, 5))}, ValueError, "`values` must have"),
    ],
)
def test_wrong_input_is_named(rng, change, error, message):
    keys, values = cache_of(rng)
    arguments = {"keys": keys, "values": values, "budget": 40, **change}
    with pytest.raises(error, match=message):
        qm.merge_kv_cache(**arguments)
