"""`gumbel_noise`: its bits, its independence of the batch, its distribution, checks.

The oracle (oracle.py) is an independent implementation with Python integers.
"""

import numpy as np
import oracle
import pytest

import qm_cupy as qm


class TestGumbelNoise:
    def test_bits_match_the_oracle(self):
        # A seed above 2³² uses both 32-bit words of the key.
        got = qm.gumbel_noise((3, 50), seed=2**40 + 7)
        assert got.dtype == np.float32
        for b in range(3):
            wanted = oracle.gumbel_noise(50, 2**40 + 7, sequence=b)
            np.testing.assert_array_equal(got[b], wanted)

    def test_sequence_numbers_of_more_than_32_bits(self):
        """A word of the counter has 32 bits, so a sequence number takes two words."""
        first = 2**32 - 1
        got = qm.gumbel_noise((2, 50), seed=7, sequence_offset=first)
        for b in range(2):
            wanted = oracle.gumbel_noise(50, 7, sequence=first + b)
            np.testing.assert_array_equal(got[b], wanted)
        # Without the second word, sequence 2³² would repeat sequence 0.
        assert not (got[1] == qm.gumbel_noise(50, seed=7)).any()

    def test_part_of_a_batch_has_the_noise_of_the_whole_batch(self):
        whole = qm.gumbel_noise((5, 9), seed=3)
        np.testing.assert_array_equal(
            qm.gumbel_noise((2, 9), seed=3, sequence_offset=3), whole[3:]
        )
        # Fewer tokens have the same noise, too.
        np.testing.assert_array_equal(qm.gumbel_noise((5, 4), seed=3), whole[:, :4])

    def test_outer_axes_are_independent(self):
        noise = qm.gumbel_noise((2, 3, 40), seed=1)
        # Outer index 0 has the noise of an array without the outer axis.
        assert not (noise[0] == noise[1]).any()
        np.testing.assert_array_equal(noise[0], qm.gumbel_noise((3, 40), seed=1))

    def test_shape_of_any_integer_type(self):
        np.testing.assert_array_equal(
            qm.gumbel_noise(np.int64(3), 0), qm.gumbel_noise(3, 0)
        )

    def test_mean_and_variance(self):
        noise = qm.gumbel_noise(200_000, seed=11)
        # A standard Gumbel variable has mean γ = 0.577 and variance π²/6.
        assert abs(noise.mean() - np.euler_gamma) < 0.01
        assert abs(noise.std() - np.pi / np.sqrt(6)) < 0.01

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_seed_out_of_range_is_refused(self, seed):
        with pytest.raises(ValueError, match=r"`seed` must lie in 0..2\*\*64 - 1"):
            qm.gumbel_noise(3, seed=seed)

    @pytest.mark.parametrize("seed", [1.0, "1", True])
    def test_seed_of_another_type_is_refused(self, seed):
        with pytest.raises(TypeError, match="`seed` must be an integer"):
            qm.gumbel_noise(3, seed=seed)
