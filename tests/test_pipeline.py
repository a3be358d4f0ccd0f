"""`quickmerge`: its stages, sources of saliency, weights, budgets and errors."""

import re
from itertools import product

import numpy as np
import pytest
from conftest import assert_close, to_library

import qm_cupy as qm
from qm_cupy import composition
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.labels import ORDERS


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((2, 30, 6))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_its_stages(tokens, method, order):
    options = {"method": method, "order": order}
    m = qm.quickmerge(
        tokens,
        0.2,
        temperature=0.5,
        epsilon=0.1,
        weights="mass",
        noise_seed=7,
        **options,
    )
    scores = qm.saliency(qm.self_attention_entropy(tokens))
    probabilities = qm.gumbel_softmax(scores, temperature=0.5, seed=7)
    mass = qm.saliency_mass(scores, probabilities, epsilon=0.1)
    # Anchors are the tokens with the largest perturbed
    # scores, as in a hard selection.
    if method == "nearest":
        noise = qm.gumbel_noise((2, 30), seed=7)
        options["anchors"] = qm.select_tokens(scores + noise, 6)
    check_stages(m, tokens, mass, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_defaults_equal_their_stages(tokens, method, order):
    options = {"method": method, "order": order}
    m = qm.quickmerge(tokens, 0.2, **options)
    if method == "nearest":  # the tokens of greatest saliency, without noise
        scores = qm.saliency(qm.self_attention_entropy(tokens))
        options["anchors"] = qm.select_tokens(scores, 6)
    check_stages(m, tokens, np.ones((2, 30)), **options)


def check_stages(merged, tokens, weights, **options):
    """Compare with clustering and merging, called one after the other.

    Bit for bit: the pipeline may fuse stages, but not change their results.
    """
    labels = qm.cluster_tokens(tokens, 6, **options)
    np.testing.assert_array_equal(merged.labels, labels)
    np.testing.assert_array_equal(merged.mass, weights)
    means = qm.merge_tokens(tokens, labels, 6, mass=weights)
    np.testing.assert_array_equal(merged.tokens, means)
    np.testing.assert_array_equal(merged.sizes, qm.group_sizes(labels, 6))
    np.testing.assert_array_equal(merged.positions, qm.group_positions(labels, 6))


@pytest.mark.parametrize("method", METHODS)
def test_one_sequence_is_a_batch_of_one(tokens, method):
    batch = qm.quickmerge(tokens[:1], 7, method=method)
    alone = qm.quickmerge(tokens[0], 7, method=method)
    for of_batch, of_one in zip(batch, alone, strict=True):
        np.testing.assert_array_equal(of_batch[0], of_one)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_equals_the_whole(tokens, method):
    options = {"method": method, "weights": "mass", "noise_seed": 2}
    whole = qm.quickmerge(tokens, 7, **options)
    # The offset makes the noise that of sequence 1, although it is sequence 0 here.
    part = qm.quickmerge(tokens[1:], 7, **options, sequence_offset=1)
    for of_whole, of_part in zip(whole, part, strict=True):
        np.testing.assert_array_equal(of_whole[1:], of_part)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_acts_like_removing_tokens(tokens, rng, method, order):
    mask = np.ones((2, 30), bool)
    mask[0, :5] = False  # padding on the left: 25 tokens, K = 5
    mask[1, rng.choice(30, 12, replace=False)] = False  # holes: 18 tokens, K = 3
    padded = np.where(mask[..., None], tokens, 1e6)
    options = {"method": method, "order": order, "weights": "mass", "noise_seed": 5}
    m = qm.quickmerge(padded, 0.2, mask=mask, **options)
    # The same sequences without their padding, each with its own noise.
    for b, count in enumerate((5, 3)):
        valid, index = tokens[b, mask[b]], np.flatnonzero(mask[b])
        cut = qm.quickmerge(valid, count, sequence_offset=b, **options)
        assert_close(m.tokens[b, :count], cut.tokens)
        np.testing.assert_array_equal(m.labels[b, mask[b]], cut.labels)
        np.testing.assert_array_equal(m.sizes[b, :count], cut.sizes)
        # Positions count all tokens, padding included.
        np.testing.assert_array_equal(m.positions[b, :count], index[cut.positions])
        assert_close(m.mass[b, mask[b]], cut.mass)
    # Sequence 1 has three groups: its last two are padded groups.
    assert not m.tokens[1, 3:].any()
    assert list(m.sizes[1, 3:]) == [0, 0]
    assert list(m.positions[1, 3:]) == [-1, -1]
    assert (m.labels[~mask] == -1).all()
    assert not m.mass[~mask].any()


def test_a_merge_applies_to_other_values(tokens, rng):
    m = qm.quickmerge(tokens, 5)
    again = qm.merge_tokens(tokens, m.labels, 5, mass=m.mass)
    np.testing.assert_array_equal(again, m.tokens)


def test_no_token_is_later_than_the_position_of_its_group(tokens):
    # A decoder that has read group k must not have seen a later token.
    m = qm.quickmerge(tokens, 9)
    assert (np.diff(m.positions, axis=-1) > 0).all()
    own = np.take_along_axis(m.positions, m.labels, axis=-1)
    assert (np.arange(30) <= own).all()


def saliency_of(tokens, budget=5, **options):
    """Return the saliency that a call computes: the weights "saliency"."""
    return qm.quickmerge(tokens, budget, weights="saliency", **options).mass


class TestSources:
    def test_tokens(self, tokens):
        wanted = qm.saliency(qm.self_attention_entropy(tokens))
        np.testing.assert_array_equal(saliency_of(tokens), wanted)

    def test_hidden_states(self, tokens, rng):
        hidden = tuple(rng.standard_normal((3, 2, 30, 4)))  # layers of (B, N, D)
        wanted = qm.saliency(qm.self_attention_entropy(hidden))
        got = saliency_of(tokens, hidden_states=hidden)
        np.testing.assert_array_equal(got, wanted)
        one = tuple(x[0] for x in hidden)
        assert_close(saliency_of(tokens[0], hidden_states=one), wanted[0])

    def test_attention(self, tokens, rng):
        attention = rng.random((3, 2, 4, 30, 30))
        attention /= attention.sum(-1, keepdims=True)  # rows sum to 1
        wanted = qm.saliency(qm.attention_entropy(attention))
        np.testing.assert_array_equal(saliency_of(tokens, attention=attention), wanted)
        # layers of (H, N, N), one such layer, and (N, N)
        for source in (tuple(attention[:, 0]), attention[0, 0], attention[0, 0, 0]):
            one = saliency_of(tokens[0], attention=source)
            lifted = attention[:, :1] if isinstance(source, tuple) else source[None]
            assert_close(one, np.ravel(qm.saliency(qm.attention_entropy(lifted))))

    def test_query_and_key(self, tokens, rng):
        query, key = rng.standard_normal((2, 3, 2, 4, 30, 5))  # (L, B, H, N, d)
        wanted = qm.saliency(qm.query_key_entropy(query, key))
        got = saliency_of(tokens, query=query, key=key)
        np.testing.assert_array_equal(got, wanted)

    def test_saliency(self, tokens):
        scores = qm.norm_saliency(tokens)
        got = saliency_of(tokens, saliency=scores)
        np.testing.assert_array_equal(got, scores)
        # Padded tokens get saliency 0 even if the argument has another value there.
        mask = np.arange(30) % 4 > 0
        padded = saliency_of(tokens[0], saliency=scores[0], mask=mask)
        np.testing.assert_array_equal(padded, scores[0] * mask)
        # This is true of NaN as well, which arrays on a GPU may hold unchecked.
        scores[0, ~mask] = np.nan
        options = {"saliency": scores[0], "mask": mask}
        with qm.check_finite(False):
            unchecked = saliency_of(tokens[0], **options)
            mass = qm.quickmerge(tokens[0], 5, weights="mass", **options).mass
        np.testing.assert_array_equal(unchecked, padded)
        assert np.isfinite(mass).all()

    def test_one_source_for_the_same_tokens(self, tokens):
        scores = qm.norm_saliency(tokens)
        with pytest.raises(ValueError, match="got saliency and hidden_states"):
            qm.quickmerge(tokens, 5, saliency=scores, hidden_states=tokens)
        with pytest.raises(ValueError, match="`query` and `key` go together"):
            qm.quickmerge(tokens, 5, query=tokens)
        with pytest.raises(ValueError, match="`saliency` must be ≥ 0"):
            qm.quickmerge(tokens, 5, saliency=-scores)

    @pytest.mark.parametrize("name", ["hidden_states", "attention", "query"])
    @pytest.mark.parametrize("shape", [(20,), (1, 30), (2, 20), (3, 1, 30), (1,) * 5])
    def test_the_error_names_the_wrong_shape(self, tokens, name, shape):
        """The last axis is N for attention, else 4; B or N is wrong in each shape."""
        source = np.ones((*shape, shape[-1] if name == "attention" else 4))
        sources = {name: source}
        if name == "query":
            sources["key"] = source
        wanted = (
            rf"`{name}` must have shape .*`tokens` of shape \(B, N, D\) = \(2, 30, .*"
            rf"got {re.escape(str(source.shape))}"
        )
        with pytest.raises(ValueError, match=wanted):
            qm.quickmerge(tokens, 5, **sources)

    def test_another_shape_of_one_sequence(self, tokens):
        with pytest.raises(ValueError, match=r"`hidden_states` must .*got \(20, 6\)"):
            qm.quickmerge(tokens[0], 5, hidden_states=tokens[0, :20])
        with pytest.raises(
            ValueError, match=r"`hidden_states` must .*got \(2, 20, 6\)"
        ):
            qm.quickmerge(tokens[0], 5, hidden_states=tokens[:, :20])


class TestWeights:
    def test_named_weights(self, tokens):
        uniform = qm.quickmerge(tokens, 5, weights="uniform")
        # The labels do not depend on the weights, so these serve for both.
        assert (uniform.mass == 1).all()
        assert_close(uniform.tokens, qm.merge_tokens(tokens, uniform.labels, 5))
        by_saliency = qm.quickmerge(tokens, 5, weights="saliency")
        scores = qm.saliency(qm.self_attention_entropy(tokens))
        np.testing.assert_array_equal(by_saliency.mass, scores)
        assert_close(
            by_saliency.tokens,
            qm.merge_tokens(tokens, uniform.labels, 5, mass=scores),
        )

    def test_array(self, tokens, rng):
        weights = rng.random((2, 30))
        m = qm.quickmerge(tokens, 5, weights=weights)
        assert_close(m.tokens, qm.merge_tokens(tokens, m.labels, 5, mass=weights))
        np.testing.assert_array_equal(m.mass, weights)

    @pytest.mark.parametrize("word", ["uniform", "saliency", "array"])
    def test_padding_has_no_weight(self, tokens, rng, word):
        weights = rng.random((2, 30)) if word == "array" else word
        mask = rng.random((2, 30)) < 0.7
        m = qm.quickmerge(tokens, 5, weights=weights, mask=mask)
        scores = qm.saliency(qm.self_attention_entropy(tokens, mask=mask), mask=mask)
        weight = {"uniform": 1, "saliency": scores, "array": weights}[word]
        np.testing.assert_array_equal(m.mass, weight * mask)

    def test_unknown_word(self, tokens):
        with pytest.raises(ValueError, match='`weights` must be "uniform", "saliency"'):
            qm.quickmerge(tokens, 5, weights="sharp")


class TestBudgets:
    def test_norm_budget(self, tokens):
        # One token has nearly all of the norm, so one group is enough for sequence 0.
        tokens[0, 0] *= 1000
        counts = qm.norm_budget(tokens, 0.8)
        m = qm.quickmerge(tokens, counts)
        assert counts[0] == 1 < counts[1]
        assert list((m.sizes > 0).sum(axis=-1)) == list(counts)

    def test_norm_budget_of_one_sequence(self, tokens, library):
        argument = to_library(library, tokens[0])
        counts = qm.norm_budget(argument, 0.5)
        m = qm.quickmerge(argument, counts)
        # The budget of one sequence has shape (), in the library's own type.
        assert m.sizes.shape == (int(counts),)

    def test_everything_kept_is_the_identity(self, tokens):
        # In float16 a mean of one token could still round; it must not.
        m = qm.quickmerge(tokens.astype(np.float16), 1.0)
        np.testing.assert_array_equal(m.tokens, tokens.astype(np.float16))

    @pytest.mark.parametrize("budget", [0, 31, 0.0, 1.1])  # K = 31 of 30 tokens
    def test_out_of_range(self, tokens, budget):
        with pytest.raises(ValueError, match="`budget` must lie in"):
            qm.quickmerge(tokens, budget)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_error_gives_a_non_finite_value_and_its_index(tokens, value):
    tokens[1, 4, 2] = value
    message = rf"`tokens` must be finite, got {value} at index \(1, 4, 2\)"
    with pytest.raises(ValueError, match=message):
        qm.quickmerge(tokens, 5)


def test_dtypes(tokens, dtype):
    m = qm.quickmerge(tokens.astype(dtype), 5)
    # The weights are float32 at least.
    wide = np.result_type(dtype, np.float32)
    assert [x.dtype for x in m] == [dtype, *["int32"] * 3, wide]
    assert all(x.flags.c_contiguous for x in m)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weights", ["mass", "saliency", "uniform", "array"])
def test_results_are_always_fresh(tokens, rng, dtype, weights, masked):
    # Fortran order and every dtype: no shortcut may return an input.
    tokens = np.asfortranarray(tokens, dtype)
    scores, array = (
        np.asfortranarray(rng.random((2, 30)), dtype=dtype) for _ in range(2)
    )
    m = qm.quickmerge(
        tokens,
        5,
        saliency=scores,
        weights=array if weights == "array" else weights,
        mask=np.asfortranarray(rng.random((2, 30)) < 0.8) if masked else None,
    )
    assert m.mass.dtype == np.result_type(dtype, np.float32)
    assert all(x.flags.c_contiguous for x in m)
    for result, argument in product(m, (tokens, scores, array)):
        assert not np.shares_memory(result, argument)


def test_the_seed_decides_the_bits(tokens):
    def merge(noise_seed=None):
        return qm.quickmerge(tokens, 5, weights="mass", noise_seed=noise_seed)

    first, again = merge(3), merge(3)
    for x, y in zip(first, again, strict=True):
        assert x.tobytes() == y.tobytes()
    assert (merge(4).mass != first.mass).any()
    assert (merge().mass != first.mass).any()


@pytest.mark.parametrize(
    ("noise_seed", "error", "message"),
    [
        (-1, ValueError, r"`noise_seed` must lie in 0..2\*\*64 - 1, got -1"),
        (2**64, ValueError, r"`noise_seed` must lie in 0..2\*\*64 - 1"),
        (0.5, TypeError, "`noise_seed` must be an integer, got float"),
        (True, TypeError, "`noise_seed` must be an integer, got a bool"),
    ],
)
def test_a_seed_is_an_integer(tokens, noise_seed, error, message):
    with pytest.raises(error, match=message):
        qm.quickmerge(tokens, 5, noise_seed=noise_seed)


# A write to a read-only array raises.
def test_inputs_are_not_written(tokens):
    tokens.flags.writeable = False
    mask = np.ones((2, 30), bool)
    mask.flags.writeable = False
    for method in METHODS:
        m = qm.quickmerge(tokens, 30, mask=mask, method=method)
        assert not np.shares_memory(m.tokens, tokens)


# K = 2 of 5 tokens, as a number or as the ratio 0.4.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2, 0.4])
def test_empty_batch_keeps_k(budget, method):
    m = qm.quickmerge(np.ones((0, 5, 3)), budget, method=method)
    assert m.tokens.shape == (0, 2, 3)
    assert m.sizes.shape == m.positions.shape == (0, 2)
    assert m.labels.shape == m.mass.shape == (0, 5)


@pytest.mark.parametrize("method", METHODS)
def test_protected_tokens_stay_alone(rng, method):
    tokens = rng.standard_normal((2, 20, 6))
    tokens[:, 9] = tokens[:, 4]  # equal to a protected token
    protect = np.zeros((2, 20), np.bool_)
    protect[0, [0, 4]] = protect[1, [4, 19]] = True
    merged = qm.quickmerge(tokens, 8, protect=protect, method=method)
    for b in range(2):
        for i in np.flatnonzero(protect[b]):
            group = merged.labels[b, i]
            # Its twin is as near as can be, but must not join it.
            assert merged.sizes[b, group] == 1
            np.testing.assert_allclose(merged.tokens[b, group], tokens[b, i])
    assert (merged.sizes > 0).all()


@pytest.mark.parametrize("weights", ["mass", "saliency", "array"])
@pytest.mark.parametrize("method", ["average", "ward"])
def test_weighted_linkage(rng, method, weights):
    # 30 tokens, and 20.
    tokens, mask = rng.standard_normal((2, 30, 6)), np.arange(30) < [[30], [20]]
    values = rng.random((2, 30)) if weights == "array" else weights
    options = {"method": method, "mask": mask}
    merged = qm.quickmerge(tokens, 7, weights=values, weighted_linkage=True, **options)
    weighed = qm.cluster_tokens(tokens, 7, mass=merged.mass, **options)
    # The weights of the means are also those of the clustering, which changes labels.
    np.testing.assert_array_equal(merged.labels, weighed)
    plain = qm.quickmerge(tokens, 7, weights=values, **options)
    assert (merged.labels != plain.labels).any()
    np.testing.assert_array_equal(merged.mass, plain.mass)


def test_weighted_linkage_is_for_methods_with_masses(rng):
    tokens = rng.standard_normal((9, 6))
    with pytest.raises(ValueError, match='is for method="average" or "ward", got'):
        qm.quickmerge(tokens, 3, method="complete", weighted_linkage=True)
    with pytest.raises(TypeError, match="`weighted_linkage` must be True or False"):
        qm.quickmerge(tokens, 3, weighted_linkage=1)


def test_a_budget_below_the_protected_tokens_is_refused_early(rng, monkeypatch):
    monkeypatch.setattr(composition, "_scores_and_weights", None)  # a call would fail
    tokens = rng.standard_normal((2, 20, 6))
    protect = np.zeros((2, 20), np.bool_)
    protect[1, :8] = True
    with pytest.raises(ValueError, match="for sequence 1, got 8: the 8 protected"):
        qm.quickmerge(tokens, 8, protect=protect)
    with pytest.raises(ValueError, match=r"`budget` must lie in 1..20"):
        qm.quickmerge(tokens, 21)
