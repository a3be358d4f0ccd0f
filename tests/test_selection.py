import numpy as np
import oracle
import pytest
from conftest import assert_close

import qm_cupy as qm
from qm_cupy.stages.selection.philox import philox4x32, uniform

# Random123's known answers: counter, key, words.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_known_answers(counter, key, words):
    got = philox4x32(tuple(counter), key[0] | key[1] << 32)
    assert [int(word) for word in got] == words
    assert list(oracle.philox4x32(counter, key)) == words


def test_uniform_never_reaches_its_ends():
    ends = uniform(np.array([0, 0xFFFFFFFF], np.uint64))
    assert 0 < ends[0] < ends[1] < 1
    assert np.float32(ends[1]) < 1


class TestGumbelNoise:
    def test_oracle_bit_for_bit(self):
        got = qm.gumbel_noise((3, 50), seed=2**40 + 7)
        assert got.dtype == np.float32
        for b in range(3):
            wanted = oracle.gumbel_noise(50, 2**40 + 7, sequence=b)
            np.testing.assert_array_equal(got[b], wanted)

    def test_sequences_from_2_to_the_32_on(self):
        """A counter's words have 32 bits: a number takes two of them."""
        first = 2**32 - 1
        got = qm.gumbel_noise((2, 50), seed=7, sequence_offset=first)
        for b in range(2):
            wanted = oracle.gumbel_noise(50, 7, sequence=first + b)
            np.testing.assert_array_equal(got[b], wanted)
        assert not (got[1] == qm.gumbel_noise(50, seed=7)).any()  # nor sequence 0's

    def test_a_part_draws_as_the_whole(self):
        whole = qm.gumbel_noise((5, 9), seed=3)
        np.testing.assert_array_equal(
            qm.gumbel_noise((2, 9), seed=3, sequence_offset=3), whole[3:]
        )
        np.testing.assert_array_equal(qm.gumbel_noise((5, 4), seed=3), whole[:, :4])

    def test_outer_axes_are_independent(self):
        noise = qm.gumbel_noise((2, 3, 40), seed=1)
        assert not (noise[0] == noise[1]).any()
        np.testing.assert_array_equal(noise[0], qm.gumbel_noise((3, 40), seed=1))

    def test_size_of_any_integer_kind(self):
        np.testing.assert_array_equal(
            qm.gumbel_noise(np.int64(3), 0), qm.gumbel_noise(3, 0)
        )

    def test_distribution(self):
        noise = qm.gumbel_noise(200_000, seed=11)
        assert abs(noise.mean() - np.euler_gamma) < 0.01
        assert abs(noise.std() - np.pi / np.sqrt(6)) < 0.01

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_seed_out_of_range(self, seed):
        with pytest.raises(ValueError, match=r"`seed` must lie in 0..2\*\*64 - 1"):
            qm.gumbel_noise(3, seed=seed)

    @pytest.mark.parametrize("seed", [1.0, "1", True])
    def test_seed_of_another_kind(self, seed):
        with pytest.raises(TypeError, match="`seed` must be an integer"):
            qm.gumbel_noise(3, seed=seed)


class TestGumbelSoftmax:
    def test_oracle(self, rng, dtype):
        saliency = rng.random((2, 12)).astype(dtype)
        noise = qm.gumbel_noise((2, 12), seed=5)
        got = qm.gumbel_softmax(saliency, temperature=0.7, seed=5)
        for b in range(2):
            wanted = oracle.gumbel_softmax(saliency[b], noise[b], 0.7)
            assert_close(got[b], wanted, dtype)

    def test_hard(self, rng):
        saliency = rng.random((2, 12))
        noise = qm.gumbel_noise((2, 12), seed=5)
        got = qm.gumbel_softmax(saliency, seed=5, hard=4)
        for b in range(2):
            np.testing.assert_array_equal(
                got[b], oracle.top_k_mask(saliency[b] + noise[b], 4)
            )

    def test_ties_go_to_the_lower_index(self):
        got = qm.gumbel_softmax(np.array([0.5, 1, 1, 0.5, 1]), seed=None, hard=2)
        np.testing.assert_array_equal(got, [0, 1, 1, 0, 0])

    def test_many_ties(self, rng):
        """More than a short sort sees, which is stable by chance."""
        saliency = rng.integers(0, 3, (2, 500)).astype(float)
        got = qm.gumbel_softmax(saliency, seed=None, hard=200)
        for b in range(2):
            np.testing.assert_array_equal(got[b], oracle.top_k_mask(saliency[b], 200))

    @pytest.mark.parametrize("temperature", [1e-45, 1e-46, 5e-324])
    def test_tiny_temperature(self, rng, dtype, temperature):
        saliency = rng.random(9).astype(dtype)
        got = qm.gumbel_softmax(saliency, temperature=temperature)
        np.testing.assert_array_equal(got, qm.gumbel_softmax(saliency, hard=1))

    @pytest.mark.parametrize("temperature", [1e46, 1e308])
    def test_huge_temperature(self, rng, dtype, temperature):
        got = qm.gumbel_softmax(rng.random(8).astype(dtype), temperature=temperature)
        np.testing.assert_array_equal(got, np.full(8, 1 / 8))

    @pytest.mark.parametrize("hard", [None, 3])
    def test_mask_is_cutting_out(self, rng, hard):
        """Noise goes by a token's rank among the tokens, not by its place."""
        saliency, mask = rng.random((4, 20)), rng.random((4, 20)) < 0.6
        mask[0] = np.arange(20) >= 8  # padding on the left
        got = qm.gumbel_softmax(saliency, seed=5, hard=hard, mask=mask)
        assert not got[~mask].any()
        for b in range(4):
            cut = qm.gumbel_softmax(
                saliency[b, mask[b]], seed=5, hard=hard, sequence_offset=b
            )
            assert_close(got[b, mask[b]], cut)

    def test_mask_and_k_per_sequence(self, rng):
        saliency = rng.random((2, 6))
        mask = np.array([[True] * 6, [True, False, True, True, False, False]])
        soft = qm.gumbel_softmax(saliency, mask=mask)
        assert_close(soft.sum(axis=-1), [1, 1])
        assert not soft[~mask].any()
        hard = qm.gumbel_softmax(saliency, hard=np.array([4, 3]), mask=mask)
        np.testing.assert_array_equal(hard.sum(axis=-1), [4, 3])
        assert not hard[~mask].any()

    @pytest.mark.parametrize("temperature", [0, -1, np.inf, np.nan])
    def test_temperature_out_of_range(self, temperature):
        with pytest.raises(ValueError, match="`temperature` must lie in"):
            qm.gumbel_softmax(np.ones(3), temperature=temperature)

    def test_more_than_the_mask_leaves(self):
        mask = np.array([[True, True, True], [True, False, False]])
        with pytest.raises(ValueError, match=r"`hard` must lie in 1\.\.1.*sequence 1"):
            qm.gumbel_softmax(np.ones((2, 3)), hard=2, mask=mask)


def test_saliency_mass(rng, dtype):
    saliency, probabilities = rng.random((2, 7)).astype(dtype)
    got = qm.saliency_mass(saliency, probabilities, epsilon=0.25)
    assert_close(got, oracle.saliency_mass(saliency, probabilities, 0.25), dtype)


def test_select_tokens():
    scores = np.array([[3.0, 1, 3, 2], [0, 5, 1, 9]])
    np.testing.assert_array_equal(qm.select_tokens(scores, 2), [[0, 2], [1, 3]])
    mask = np.array([[True] * 4, [True, True, True, False]])
    got = qm.select_tokens(scores, np.array([3, 1]), mask=mask)
    np.testing.assert_array_equal(got, [[0, 2, 3], [1, -1, -1]])
    assert got.dtype == np.int32


def test_select_tokens_among_many_ties(rng):
    scores = rng.integers(0, 3, (2, 500)).astype(float)
    got = qm.select_tokens(scores, 200)
    for b in range(2):
        wanted = np.flatnonzero(oracle.top_k_mask(scores[b], 200))
        np.testing.assert_array_equal(got[b], wanted)


def test_empty_batch_keeps_k():
    assert qm.select_tokens(np.ones((0, 5)), 2).shape == (0, 2)
