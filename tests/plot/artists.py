"""One problem for every picture, and what was drawn, read from matplotlib's artists."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

import qm_cupy as qm

plt.switch_backend("Agg")  # for the doctests as well: no window opens

WORDS = ["to", "be", "or", "not", "to", "be"]
LABELS = np.array([3, 4, 1, 2, 3, 4])
TREE = qm.linkage(np.random.default_rng(20260101).standard_normal((12, 5)), "ward")
CALLS = {  # every function with arrays of one problem
    "plot_groups": ((LABELS,), {"words": WORDS}),
    "plot_saliency": ((np.linspace(0, 1, 12).reshape(2, 6),), {"words": WORDS}),
    "plot_dendrogram": ((TREE,), {"num_groups": 3}),
    "plot_similarity": ((np.eye(6), LABELS), {}),
    "plot_budget": ((np.array([2, 4]), np.array([0.5, 0.25])), {}),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def arcs_of(ax):
    """Return the tokens that every group's arcs start and end at."""
    return {
        arcs.get_label(): [(line[0, 0], line[-1, 0]) for line in arcs.get_segments()]
        for arcs in ax.collections
        if arcs.get_label().startswith("group")
    }


def dots_of(ax):
    """Return the tokens under every kind of dot."""
    return {
        dots.get_label(): sorted(dots.get_offsets()[:, 0].astype(int).tolist())
        for dots in ax.collections
        if len(dots.get_offsets()) and not dots.get_label().startswith("group")
    }


def edges_of(ax):
    (lines,) = ax.collections
    return {frozenset(map(tuple, line.tolist())) for line in lines.get_segments()}


def luminance(colour):
    """Return how light a grey print shows it, within [0, 1]."""
    return np.dot(to_rgb(colour), (0.299, 0.587, 0.114))


def pixels(figure):
    figure.set_size_inches(4, 3)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()
