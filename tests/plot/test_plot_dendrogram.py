"""Dendrograms: branches and their cut, read from matplotlib's artists.

A merge is drawn as a bracket: two vertical feet and a horizontal line at its height.
"""

import numpy as np
import pytest
from artists import TREE, WORDS, closed, words_of  # noqa: F401
from matplotlib import pyplot as plt

import qm_cupy as qm
from qm_cupy.plot import plot_dendrogram


@pytest.mark.parametrize("num_groups", [1, 2, 5, 11, 12])
def test_cut_is_above_the_merges_it_keeps(num_groups):
    """The lowest N - K merges leave K groups; the cut is above them."""
    ax = plot_dendrogram(TREE, num_groups=num_groups)
    (cut,) = {float(y) for y in ax.lines[0].get_ydata()}
    kept = 12 - num_groups
    assert (TREE[:kept, 2] <= cut).all()
    assert (TREE[kept:, 2] >= cut).all()
    brackets = ax.collections[0]
    assert len(brackets.get_segments()) == 11  # the merges of 12 tokens
    # Merges below the cut are solid, those above it are dashed.
    solid = [dashes[1] is None for dashes in brackets.get_linestyle()]
    assert solid == [True] * kept + [False] * (11 - kept)
    low, high = ax.get_ylim()
    assert low <= cut <= high  # the line is visible


def test_cut_is_half_way():
    """12 tokens, 4 groups: 8 merges are below the cut."""
    ax = plot_dendrogram(TREE, num_groups=4)
    assert ax.lines[0].get_ydata()[0] == (TREE[7, 2] + TREE[8, 2]) / 2


def test_numbers_stand_over_their_groups():
    labels = qm.cut_linkage(TREE, num_groups=5)
    ax = plot_dendrogram(TREE, num_groups=5)
    leaves = [int(word) for word in words_of(ax.xaxis)]
    assert sorted(leaves) == list(range(12))  # each token once
    for number in ax.texts:
        positions = np.flatnonzero(labels[leaves] == int(number.get_text()))
        assert np.diff(positions).tolist() == [1] * (len(positions) - 1)  # side by side
        assert min(positions) <= number.get_position()[0] <= max(positions)
    assert sorted(int(number.get_text()) for number in ax.texts) == list(range(5))


def test_brackets_stand_on_each_other():
    """Each bracket is at the height of its merge and stands on its two branches."""
    # Points 0 and 3 of a bracket are its feet; 1 and 2 are the ends of its top.
    brackets = plot_dendrogram(TREE).collections[0].get_segments()
    for row, line in zip(TREE, brackets, strict=True):
        np.testing.assert_array_equal(line[1:3, 1], row[2])
        for child, foot in zip(row[:2].astype(int), line[[0, 3]], strict=True):
            if child >= 12:  # a merge: the foot is on the middle of its bracket
                below = brackets[child - 12]
                assert foot[0] == (below[0, 0] + below[3, 0]) / 2
                assert foot[1] == below[1, 1]
            else:  # a token
                assert foot[1] == 0


def test_leaves_are_in_reading_order_if_the_tree_allows():
    """Here it does: tokens 0 and 1 are alike, and so are tokens 2 and 3."""
    tokens = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    ax = plot_dendrogram(qm.linkage(tokens), words=WORDS[:5])
    assert words_of(ax.xaxis) == WORDS[:5]
    assert not ax.lines  # without `num_groups` there is no cut


def test_dendrogram_of_a_padded_sequence(rng):
    """It looks like the dendrogram of the tokens without padding."""
    mask = np.array([True, True, False, True, True, False])
    tokens = rng.standard_normal((6, 3))
    tree = qm.linkage(tokens, mask=mask)
    ax = plot_dendrogram(tree, num_groups=2, mask=mask, words=WORDS)
    whole = plot_dendrogram(qm.linkage(tokens[mask]), num_groups=2)
    assert sorted(words_of(ax.xaxis)) == sorted(np.array(WORDS)[mask])
    for got, wanted in zip(ax.collections, whole.collections, strict=True):
        np.testing.assert_array_equal(got.get_segments(), wanted.get_segments())
    numbers = [{text.get_position() for text in x.texts} for x in (ax, whole)]
    assert numbers[0] == numbers[1]


def test_dendrogram_of_one_token_and_of_equal_ones():
    assert words_of(plot_dendrogram(np.empty((0, 4)), num_groups=1).xaxis) == ["0"]
    # Equal tokens: all merges have height 0, up to rounding.
    ax = plot_dendrogram(qm.linkage(np.ones((3, 2))), num_groups=2)
    assert ax.lines[0].get_ydata()[0] < 1e-15
    assert len(ax.texts) == 2


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.ones((3, 4))], {}, "group at most once"),
    ],
)
def test_wrong_values(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        plot_dendrogram(*arrays, **options)
    assert not plt.get_fignums()  # the check comes before the drawing


def test_dendrograms_of_a_batch_and_of_another_mask(rng):
    tokens = rng.standard_normal((2, 5, 3))
    with pytest.raises(ValueError, match=r"shape \(N - 1, 4\), got \(2, 4, 4\)"):
        plot_dendrogram(qm.linkage(tokens))
    mask = np.array([True, True, True, False, True])
    with pytest.raises(ValueError, match="give the `mask`"):
        plot_dendrogram(qm.linkage(tokens[0], mask=mask))
    with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
        plot_dendrogram(qm.linkage(tokens[0]), num_groups=6)
