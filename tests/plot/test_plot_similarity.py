"""Similarities as shades, with a frame for each group, read from the artists."""

import numpy as np
import pytest
from artists import LABELS, closed, words_of  # noqa: F401
from matplotlib import pyplot as plt

import qm_cupy as qm
from qm_cupy.plot import plot_similarity


def test_similarity_in_group_order(rng):
    tokens = rng.standard_normal((7, 3))
    labels = np.array([2, 0, -1, 1, 0, 2, 2])
    similarity = qm.cosine_similarity(tokens)
    ax = plot_similarity(similarity, labels)
    # Tokens by group: 1 and 4, then 3, then 0, 5 and 6. Token 2 is padding.
    order = [1, 4, 3, 0, 5, 6]
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(drawn, similarity[np.ix_(order, order)])
    # (x, y, width); the centre of token i is at i, so the first frame starts at -0.5.
    frames = [(*frame.get_xy(), frame.get_width()) for frame in ax.patches]
    assert frames == [(-0.5, -0.5, 2), (1.5, 1.5, 1), (2.5, 2.5, 3)]
    assert words_of(ax.xaxis) == words_of(ax.yaxis) == ["0", "1", "2"]
    assert ax.get_xticks().tolist() == [0.5, 2.0, 4.0]  # the middles of the frames


def test_numbers_of_many_groups_do_not_overlap():
    """Of 50 groups, every third one has a number."""
    ax = plot_similarity(np.eye(50), np.arange(50))
    assert words_of(ax.xaxis) == [str(k) for k in range(0, 50, 3)]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.ones((2, 3)), LABELS], {}, r"\(N, N\) = \(2, 2\)"),
        ([np.eye(2), LABELS], {}, r"\(N\) = \(2,\), got \(6,\)"),
        ([np.eye(6), 0 * LABELS - 1], {}, "at least one token"),
    ],
)
def test_wrong_values(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        plot_similarity(*arrays, **options)
    assert not plt.get_fignums()  # the check comes before the drawing
