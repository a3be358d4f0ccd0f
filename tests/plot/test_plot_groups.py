"""Groups: outlines and arcs, read from matplotlib's artists."""

import numpy as np
import pytest
from artists import (  # noqa: F401
    LABELS,
    WORDS,
    arcs_of,
    closed,
    dots_of,
    edges_of,
    luminance,
    words_of,
)
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

import qm_cupy as qm
from qm_cupy.plot import plot_groups

ONES = np.ones(6)
PATCHES = {"grid": (2, 3)}


def test_outlines_lie_between_groups():
    """2 × 3 patches: the labels are 0 0 1 in the first row and 0 2 1 in the second."""
    ax = plot_groups(np.array([0, 0, 1, 0, 2, 1]), grid=(2, 3))
    # End points (x, y) of the lines: 0|1 and 0|2 and 2|1 side by side, 0 above 2.
    wanted = [((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((1, 1), (2, 1))]
    assert edges_of(ax) == {frozenset(edge) for edge in wanted}
    assert ax.get_xlim() == (0, 3)
    assert ax.get_ylim() == (2, 0)  # the first row is at the top


def test_outlines_of_one_group_and_of_single_patches():
    """One group has no outline. Single patches have all inner edges of the grid."""
    assert not edges_of(plot_groups(np.zeros(12, int), grid=(3, 4)))
    assert len(edges_of(plot_groups(np.arange(12), grid=(3, 4)))) == 3 * 3 + 2 * 4


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_lines_are_darker_than_the_picture(rng, shape):
    """For every picture: its colours are moved to the lighter half."""
    pictures = rng.random(shape), np.zeros(shape, np.uint8)  # the second is black
    for picture in pictures:
        ax = plot_groups(np.arange(6), grid=(2, 3), picture=picture)
        drawn = ax.images[0].get_array()
        assert drawn.shape == shape
        assert drawn.min() >= 0.5
        assert drawn.max() <= 1
        line = ax.collections[0].get_color()[0]
        assert luminance(line) < 0.5 - 0.25  # at least 0.25 darker than any pixel
        assert ax.images[0].get_extent() == [0, 3, 2, 0]
    np.testing.assert_array_equal(drawn, np.full(shape, 0.5))  # black becomes grey


def test_arcs_lead_to_the_next_token_of_the_group():
    """Group 0 has tokens 0, 2 and 4; groups 1 and 2 have one token; -1 is padding."""
    ax = plot_groups(np.array([0, 1, 0, -1, 0, 2]), words=WORDS)
    assert arcs_of(ax) == {"group 0": [(0, 2), (2, 4)]}
    assert dots_of(ax) == {
        "last of its group": [1, 4, 5],
        "merged into a later token": [0, 2],
        "in no group": [3],
    }
    assert words_of(ax.xaxis) == WORDS


def test_dots_are_at_the_positions_of_merged_tokens(rng):
    labels = qm.cluster_tokens(rng.standard_normal((30, 4)), 9)
    ax = plot_groups(labels)
    positions = qm.group_positions(labels, 9)  # the last member of each group
    assert dots_of(ax)["last of its group"] == positions.tolist()
    joined = sum(map(len, arcs_of(ax).values()))
    assert joined == 30 - 9  # a group of n tokens has n - 1 arcs


def test_no_two_of_28_groups_are_drawn_alike():
    """Colours repeat, but not together with the same line style."""
    ax = plot_groups(np.arange(56) % 28)
    styles = {
        (to_hex(arcs.get_color()[0]), str(arcs.get_linestyle()))
        for arcs in ax.collections
        if arcs.get_label().startswith("group")
    }
    assert len(styles) == 28


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([LABELS], {"grid": (2, 2)}, r"\(N\) = \(4,\), got \(6,\)"),
        ([LABELS], {"words": ["to"]}, r"\(N\) = \(1,\), got \(6,\)"),
        ([LABELS[None]], {}, r"\(N\) = \(6,\), got \(1, 6\)"),
        ([LABELS - 9], {}, "`labels` must lie in -1"),
        ([LABELS], {"grid": (-2, -3)}, "`grid` must be 1 or more"),
        ([LABELS], {"picture": np.eye(6)}, "needs the `grid`"),
        ([LABELS], {"words": WORDS, **PATCHES}, "`grid` or `words`"),
        ([LABELS], {"picture": np.ones((4, 6, 4)), **PATCHES}, "H, W, 3"),
        ([LABELS], {"picture": np.full((4, 6), np.inf), **PATCHES}, "finite"),
    ],
)
def test_wrong_values(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        plot_groups(*arrays, **options)
    assert not plt.get_fignums()  # the check comes before the drawing


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([ONES], {}, "`labels` must be integers"),
        ([LABELS], {"grid": 6}, "two integers"),
        ([LABELS], {"grid": (2, 3.0)}, "`grid` must be an integer"),
        ([LABELS], {"picture": LABELS[None], **PATCHES}, "float16"),
    ],
)
def test_wrong_types(arrays, options, message):
    with pytest.raises(TypeError, match=message):
        plot_groups(*arrays, **options)
    assert not plt.get_fignums()
