"""Windows of similar tokens, and the ward dendrograms of many windows at once."""

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.caches.window_linkage import window_linkage
from qm_cupy.caches.windows import windows_of_similar


def heights(merges, window):
    """Return the heights of all merges of a window, ascending."""
    height = merges.height[window]
    return np.sort(height[np.isfinite(height)])


class TestWindowLinkage:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("size", [1, 2, 17, 60])
    def test_heights_are_those_of_linkage(self, rng, dtype, size):
        vectors = rng.standard_normal((7, size, 5)).astype(dtype) + dtype(3)
        mass = (rng.random((7, size)) + 0.1).astype(dtype)
        merges = window_linkage(vectors, mass, np.ones((7, size), bool))
        for window in range(7):
            wanted = np.empty(0)
            if size > 1:
                # The dendrogram of the library, one merge at a time.
                args = vectors[window], "ward"
                tree = qm.linkage(*args, metric="euclidean", mass=mass[window])
                wanted = tree[:, 2]
            # Sums of float32 lose digits in every merge.
            tolerance = 1e-4 if dtype == np.float32 else 1e-9
            np.testing.assert_allclose(
                heights(merges, window), wanted, rtol=tolerance, atol=tolerance
            )

    def test_padding_takes_no_part(self, rng):
        vectors, mass = rng.standard_normal((3, 20, 4)), rng.random((3, 20)) + 0.1
        valid = rng.random((3, 20)) < 0.6
        valid[2] = False
        merges = window_linkage(vectors, mass, valid)
        for window in range(2):  # the last one is all padding
            present = valid[window]
            # The tokens alone, without padding.
            one = window_linkage(
                vectors[window, present][None],
                mass[window, present][None],
                np.ones((1, present.sum()), bool),
            )
            np.testing.assert_allclose(
                heights(merges, window), heights(one, 0), rtol=1e-9
            )
            # Padding neither absorbs a cluster nor is absorbed.
            into = merges.into[window][np.isfinite(merges.height[window])]
            assert present[into].all()
            assert np.isinf(merges.height[window][~present]).all()
        assert np.isinf(merges.height[2]).all()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_equal_tokens_merge_first_and_lower_than_others(self, rng, dtype):
        vectors = rng.standard_normal((1, 10, 6)).astype(dtype)
        vectors = np.repeat(vectors, 12, axis=1)  # every token twelve times
        merges = window_linkage(
            vectors, np.ones((1, 120), dtype), np.ones((1, 120), bool)
        )
        height = heights(merges, 0)
        assert len(height) == 119
        # 10 groups of equal tokens need 110 merges.
        assert height[109] < 1e-4 * height[110]

    def test_windows_do_not_depend_on_each_other(self, rng):
        vectors, mass = rng.standard_normal((9, 30, 4)), rng.random((9, 30)) + 0.1
        valid = np.ones((9, 30), bool)
        whole = window_linkage(vectors, mass, valid)
        for window in range(9):
            one = slice(window, window + 1)
            # The same window in a call of its own.
            alone = window_linkage(vectors[one], mass[one], valid[one])
            np.testing.assert_array_equal(whole.height[one], alone.height)
            np.testing.assert_array_equal(whole.into[one], alone.into)


class TestWindows:
    @pytest.mark.parametrize(
        ("num_tokens", "size"), [(1, 8), (9, 8), (100, 8), (64, 64)]
    )
    def test_every_free_token_is_in_one_window(self, rng, num_tokens, size):
        vectors = rng.standard_normal((3, num_tokens, 4))
        free = rng.random((3, num_tokens)) < 0.7
        free[:, 0] = True
        index = windows_of_similar(vectors, free, free.sum(-1), size)
        assert index.shape[2] <= size
        for sequence in range(3):
            # N fills windows that are not full.
            inside = index[sequence][index[sequence] < num_tokens]
            np.testing.assert_array_equal(
                np.sort(inside), np.flatnonzero(free[sequence])
            )
            # Within a window, tokens are in their order.
            assert (np.diff(index[sequence], axis=-1) >= 0).all()

    def test_similar_tokens_are_in_the_same_window(self, rng):
        centres = 10 * rng.standard_normal((4, 6))
        group = rng.integers(0, 4, 200)
        vectors = (centres[group] + rng.standard_normal((200, 6)))[None]
        index = windows_of_similar(
            vectors, np.ones((1, 200), bool), np.array([200]), 64
        )
        # The variance within each window, compared with that of all tokens.
        spread = [
            vectors[0, window[window < 200]].var(axis=0).sum() for window in index[0]
        ]
        assert np.mean(spread) < 0.5 * vectors[0].var(axis=0).sum()

    def test_windows_do_not_depend_on_other_sequences(self, rng):
        vectors = rng.standard_normal((3, 90, 4))
        free = np.ones((3, 90), bool)
        free[1, :40] = False
        index = windows_of_similar(vectors, free, free.sum(-1), 16)
        for sequence in range(3):
            one = slice(sequence, sequence + 1)
            alone = windows_of_similar(vectors[one], free[one], free[one].sum(-1), 16)
            _, count, size = alone.shape
            np.testing.assert_array_equal(index[one, :count, :size], alone)
            # What is left is filled with N.
            assert (index[one, count:] == 90).all()
