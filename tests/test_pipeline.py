import numpy as np
import pytest
from conftest import assert_close

import qm_cupy as qm
from qm_cupy.clustering import METHODS


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((2, 30, 6))


def test_is_its_stages(tokens):
    m = qm.quickmerge(tokens, 0.2, temperature=0.5, epsilon=0.1, seed=7)
    scores = qm.saliency(qm.self_attention_entropy(tokens))
    probabilities = qm.gumbel_softmax(scores, temperature=0.5, seed=7)
    mass = qm.saliency_mass(scores, probabilities, epsilon=0.1)
    labels = qm.cluster_tokens(tokens, 6)
    np.testing.assert_array_equal(m.saliency, scores)
    np.testing.assert_array_equal(m.mass, mass)
    np.testing.assert_array_equal(m.labels, labels)
    np.testing.assert_array_equal(
        m.tokens, qm.merge_tokens(tokens, labels, 6, mass=mass)
    )
    np.testing.assert_array_equal(m.sizes, qm.group_sizes(labels, 6))
    np.testing.assert_array_equal(m.positions, qm.group_positions(labels, 6))


@pytest.mark.parametrize("method", METHODS)
def test_one_sequence_is_a_batch_of_one(tokens, method):
    batch = qm.quickmerge(tokens[:1], 7, method=method)
    alone = qm.quickmerge(tokens[0], 7, method=method)
    for of_batch, of_one in zip(batch, alone, strict=True):
        np.testing.assert_array_equal(of_batch[0], of_one)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_is_as_the_whole(tokens, method):
    whole = qm.quickmerge(tokens, 7, method=method)
    part = qm.quickmerge(tokens[1:], 7, method=method, sequence_offset=1)
    for of_whole, of_part in zip(whole, part, strict=True):
        np.testing.assert_array_equal(of_whole[1:], of_part)


@pytest.mark.parametrize("method", METHODS)
def test_mask_is_cutting_off(tokens, method):
    mask = np.ones((2, 30), bool)
    mask[1, 20:] = False
    rubbish = tokens.copy()
    rubbish[1, 20:] = 1e6
    m = qm.quickmerge(rubbish, 0.2, mask=mask, method=method)
    cut = qm.quickmerge(tokens[1:, :20], 0.2, method=method, sequence_offset=1)
    assert_close(m.tokens[1, :4], cut.tokens[0])
    np.testing.assert_array_equal(m.labels[1, :20], cut.labels[0])
    np.testing.assert_array_equal(m.sizes[1], [*cut.sizes[0], 0, 0])
    np.testing.assert_array_equal(m.positions[1], [*cut.positions[0], -1, -1])
    assert not m.tokens[1, 4:].any()
    assert not m.saliency[1, 20:].any()
    assert not m.mass[1, 20:].any()


def test_merge_carries_over_to_other_values(tokens, rng):
    m = qm.quickmerge(tokens, 5)
    again = qm.merge_tokens(tokens, m.labels, 5, mass=m.mass)
    np.testing.assert_array_equal(again, m.tokens)


def test_no_token_is_later_than_its_group(tokens):
    m = qm.quickmerge(tokens, 9)
    assert (np.diff(m.positions, axis=-1) > 0).all()
    own = np.take_along_axis(m.positions, m.labels, axis=-1)
    assert (np.arange(30) <= own).all()


class TestSources:
    def test_hidden_states(self, tokens, rng):
        hidden = rng.standard_normal((3, 2, 30, 4))
        m = qm.quickmerge(tokens, 5, hidden_states=hidden)
        wanted = qm.saliency(qm.self_attention_entropy(hidden))
        np.testing.assert_array_equal(m.saliency, wanted)
        one = qm.quickmerge(tokens[0], 5, hidden_states=hidden[:, 0])
        assert_close(one.saliency, wanted[0])

    def test_attention(self, tokens, rng):
        attention = rng.random((3, 2, 4, 30, 30))
        attention /= attention.sum(-1, keepdims=True)
        m = qm.quickmerge(tokens, 5, attention=attention)
        wanted = qm.saliency(qm.attention_entropy(attention))
        np.testing.assert_array_equal(m.saliency, wanted)
        for given in (attention[:, 0], attention[0, 0, 0]):  # (L,H,N,N), (N,N)
            one = qm.quickmerge(tokens[0], 5, attention=given)
            lifted = given[:, None] if given.ndim == 4 else given
            assert_close(
                one.saliency, np.ravel(qm.saliency(qm.attention_entropy(lifted)))
            )

    def test_query_and_key(self, tokens, rng):
        query, key = rng.standard_normal((2, 3, 2, 4, 30, 5))
        m = qm.quickmerge(tokens, 5, query=query, key=key)
        wanted = qm.saliency(qm.query_key_entropy(query, key))
        np.testing.assert_array_equal(m.saliency, wanted)

    def test_given(self, tokens):
        scores = qm.norm_saliency(tokens)
        m = qm.quickmerge(tokens, 5, saliency=scores)
        np.testing.assert_array_equal(m.saliency, scores)

    def test_only_one_and_of_the_same_tokens(self, tokens):
        scores = qm.norm_saliency(tokens)
        with pytest.raises(ValueError, match="got saliency and hidden_states"):
            qm.quickmerge(tokens, 5, saliency=scores, hidden_states=tokens)
        with pytest.raises(ValueError, match="`query` and `key` go together"):
            qm.quickmerge(tokens, 5, query=tokens)
        with pytest.raises(ValueError, match="`hidden_states` must have shape"):
            qm.quickmerge(tokens, 5, hidden_states=tokens[:, :20])
        with pytest.raises(ValueError, match="`saliency` must be ≥ 0"):
            qm.quickmerge(tokens, 5, saliency=-scores)


class TestWeights:
    def test_words(self, tokens):
        uniform = qm.quickmerge(tokens, 5, weights="uniform")
        assert_close(uniform.tokens, qm.merge_tokens(tokens, uniform.labels, 5))
        by_saliency = qm.quickmerge(tokens, 5, weights="saliency")
        np.testing.assert_array_equal(by_saliency.mass, by_saliency.saliency)

    def test_array(self, tokens, rng):
        weights = rng.random((2, 30))
        m = qm.quickmerge(tokens, 5, weights=weights)
        assert_close(m.tokens, qm.merge_tokens(tokens, m.labels, 5, mass=weights))
        assert not np.shares_memory(m.mass, weights)

    def test_unknown_word(self, tokens):
        with pytest.raises(ValueError, match='`weights` must be "mass", "saliency"'):
            qm.quickmerge(tokens, 5, weights="sharp")


class TestBudgets:
    def test_norm_budget(self, tokens):
        tokens[0, 0] *= 1000
        counts = qm.norm_budget(tokens, 0.8)
        m = qm.quickmerge(tokens, counts)
        assert counts[0] == 1 < counts[1]
        assert list((m.sizes > 0).sum(axis=-1)) == list(counts)

    def test_everything_kept_is_the_identity(self, tokens):
        m = qm.quickmerge(tokens.astype(np.float16), 1.0)
        np.testing.assert_array_equal(m.tokens, tokens.astype(np.float16))

    @pytest.mark.parametrize("budget", [0, 31, 0.0, 1.1])
    def test_out_of_range(self, tokens, budget):
        with pytest.raises(ValueError, match="`budget` must lie in"):
            qm.quickmerge(tokens, budget)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_named_and_placed(tokens, value):
    tokens[1, 4, 2] = value
    message = rf"`tokens` must be finite, got {value} at index \(1, 4, 2\)"
    with pytest.raises(ValueError, match=message):
        qm.quickmerge(tokens, 5)


def test_dtypes(tokens, dtype):
    m = qm.quickmerge(tokens.astype(dtype), 5)
    wide = np.result_type(dtype, np.float32)
    assert [x.dtype for x in m] == [dtype, *["int32"] * 3, wide, wide]
    assert all(x.flags.c_contiguous for x in m)


def test_same_seed_same_bits_other_seed_others(tokens):
    first, again = (qm.quickmerge(tokens, 5, seed=3) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        assert x.tobytes() == y.tobytes()
    assert (qm.quickmerge(tokens, 5, seed=4).mass != first.mass).any()


def test_inputs_are_not_written(tokens):
    tokens.flags.writeable = False
    mask = np.ones((2, 30), bool)
    mask.flags.writeable = False
    for method in METHODS:
        m = qm.quickmerge(tokens, 30, mask=mask, method=method)
        assert not np.shares_memory(m.tokens, tokens)


def test_empty_batch():
    m = qm.quickmerge(np.ones((0, 5, 3)), 2)
    assert m.labels.shape == (0, 5)
