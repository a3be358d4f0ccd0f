"""Common inputs of all pictures, and functions that read what matplotlib has drawn.

matplotlib keeps each line, dot and text as an object, an artist. The tests read these
objects, because pixels would depend on fonts and on matplotlib's version.
"""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import qm_cupy as qm

plt.switch_backend("Agg")  # no window opens, neither here nor in doctests

# Six tokens in four groups, numbered 1 to 4: equal words are in one group.
WORDS = ["to", "be", "or", "not", "to", "be"]
LABELS = np.array([3, 4, 1, 2, 3, 4])
TREE = qm.linkage(np.random.default_rng(20260101).standard_normal((12, 5)), "ward")
# Positional and keyword arguments for every public function.
CALLS = {
    "plot_groups": ((LABELS,), {"words": WORDS}),
    "plot_saliency": ((np.linspace(0, 1, 12).reshape(2, 6),), {"words": WORDS}),
    "plot_dendrogram": ((TREE,), {"num_groups": 3}),
    "plot_similarity": ((np.eye(6), LABELS), {}),
    "plot_budget": ((np.array([2, 4]), np.array([0.5, 0.25])), {}),
}


@pytest.fixture(autouse=True)
def closed():
    """Close all figures after each test; matplotlib would keep them open."""
    yield
    plt.close("all")


def words_of(axis):
    """Return the labels of an axis."""
    return [label.get_text() for label in axis.get_ticklabels()]


def arcs_of(ax):
    """Return the tokens at which the arcs of each group start and end."""
    # A segment has shape (points, 2); column 0 is the position of a token.
    return {
        arcs.get_label(): [(line[0, 0], line[-1, 0]) for line in arcs.get_segments()]
        for arcs in ax.collections
        if arcs.get_label().startswith("group")
    }


def dots_of(ax):
    """Return the tokens with a dot, by the label of the dots."""
    # An arc and an empty set of dots are not dots.
    return {
        dots.get_label(): sorted(dots.get_offsets()[:, 0].astype(int).tolist())
        for dots in ax.collections
        if len(dots.get_offsets()) and not dots.get_label().startswith("group")
    }


def edges_of(ax):
    """Return the lines of the outlines, each as its two end points in any order."""
    (lines,) = ax.collections
    return {frozenset(map(tuple, line.tolist())) for line in lines.get_segments()}


def luminance(colour):
    """Return the lightness of a colour in a grey print, within [0, 1]."""
    # Weights of red, green and blue, by ITU-R BT.601.
    return np.dot(to_rgb(colour), (0.299, 0.587, 0.114))


def pixels(figure):
    """Draw a figure, and return its pixels."""
    figure.set_size_inches(4, 3)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()
