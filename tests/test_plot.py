"""What is drawn, read back from matplotlib's own artists."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import matplotlib

matplotlib.use("Agg")  # for the doctests as well: no window opens
from conftest import to_library
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb

import qm_cupy as qm
from qm_cupy import plot
from qm_cupy.plot import (
    drawing,
    plot_budget,
    plot_dendrogram,
    plot_groups,
    plot_saliency,
    plot_similarity,
)

WORDS = ["to", "be", "or", "not", "to", "be"]
LABELS = np.array([3, 4, 1, 2, 3, 4])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def tree(rng):
    return qm.linkage(rng.standard_normal((12, 5)), "ward")


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


def test_outlines_lie_between_groups():
    ax = plot_groups(np.array([0, 0, 1, 0, 2, 1]), grid=(2, 3))
    wanted = [((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((1, 1), (2, 1))]
    assert edges_of(ax) == {frozenset(edge) for edge in wanted}
    assert ax.get_xlim() == (0, 3)
    assert ax.get_ylim() == (2, 0)  # the first row on top


def test_one_group_has_no_outline_and_every_patch_alone_all():
    assert not edges_of(plot_groups(np.zeros(12, int), grid=(3, 4)))
    assert len(edges_of(plot_groups(np.arange(12), grid=(3, 4)))) == 3 * 3 + 2 * 4


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_lines_are_darker_than_the_picture(rng, shape):
    """Whatever the picture is: it is paled to the lighter half."""
    pictures = rng.random(shape), np.zeros(shape, np.uint8)
    for picture in pictures:
        ax = plot_groups(np.arange(6), grid=(2, 3), picture=picture)
        drawn = ax.images[0].get_array()
        assert drawn.shape == shape
        assert drawn.min() >= 0.5
        assert drawn.max() <= 1
        line = ax.collections[0].get_color()[0]
        assert luminance(line) < 0.5 - 0.25
        assert ax.images[0].get_extent() == [0, 3, 2, 0]
    np.testing.assert_array_equal(drawn, np.full(shape, 0.5))


def test_arcs_lead_to_the_next_of_the_group():
    ax = plot_groups(np.array([0, 1, 0, -1, 0, 2]), words=WORDS)
    assert arcs_of(ax) == {"group 0": [(0, 2), (2, 4)]}
    assert dots_of(ax) == {
        "last of its group": [1, 4, 5],
        "merged into a later one": [0, 2],
        "in no group": [3],
    }
    assert words_of(ax.xaxis) == WORDS


def test_dots_stand_where_the_merged_tokens_do(rng):
    labels = qm.cluster_tokens(rng.standard_normal((30, 4)), 9)
    ax = plot_groups(labels)
    positions = qm.group_positions(labels, 9)
    assert dots_of(ax)["last of its group"] == positions.tolist()
    joined = sum(map(len, arcs_of(ax).values()))
    assert joined == 30 - 9  # one arc fewer than each group has tokens


def test_no_two_of_28_groups_are_drawn_alike():
    ax = plot_groups(np.arange(56) % 28)
    styles = {
        (to_hex(arcs.get_color()[0]), str(arcs.get_linestyle()))
        for arcs in ax.collections
        if arcs.get_label().startswith("group")
    }
    assert len(styles) == 28


def test_saliency_by_token_and_layer(rng):
    values = rng.random((6, 4))
    ax = plot_saliency(values, words=WORDS[:4], label="entropy, nats")
    np.testing.assert_array_equal(ax.images[0].get_array(), values)
    assert ax.images[0].get_extent() == [-0.5, 3.5, 6.5, 0.5]  # layers from 1
    assert words_of(ax.xaxis) == WORDS[:4]
    assert ax.images[0].colorbar.ax.get_ylabel() == "entropy, nats"
    assert ax.images[0].get_clim() == (values.min(), values.max())


def test_saliency_of_one_layer_and_its_limits():
    ax = plot_saliency(np.array([0.5, 0.25]), limits=(0, 1))
    assert ax.images[0].get_array().shape == (1, 2)
    assert ax.images[0].get_clim() == (0, 1)
    assert not ax.get_yticks().size


def test_saliency_of_patches():
    values = np.arange(6.0)
    ax = plot_saliency(values, grid=(2, 3))
    np.testing.assert_array_equal(ax.images[0].get_array(), values.reshape(2, 3))
    assert ax.images[0].get_extent() == [0, 3, 2, 0]  # as the outlines of the groups


def test_scale_grows_lighter():
    shades = plot_saliency(np.arange(5.0)).images[0].get_cmap()(np.linspace(0, 1, 9))
    light = [luminance(shade[:3]) for shade in shades]
    assert light == sorted(light)


@pytest.mark.parametrize("num_groups", [1, 2, 5, 11, 12])
def test_cut_is_above_the_merges_it_keeps(tree, num_groups):
    ax = plot_dendrogram(tree, num_groups=num_groups)
    (cut,) = {float(y) for y in ax.lines[0].get_ydata()}
    kept = 12 - num_groups
    assert (tree[:kept, 2] <= cut).all()
    assert (tree[kept:, 2] >= cut).all()
    brackets = ax.collections[0]
    assert len(brackets.get_segments()) == 11
    solid = [dashes[1] is None for dashes in brackets.get_linestyle()]
    assert solid == [True] * kept + [False] * (11 - kept)
    low, high = ax.get_ylim()
    assert low <= cut <= high


def test_cut_is_half_way(tree):
    ax = plot_dendrogram(tree, num_groups=4)
    assert ax.lines[0].get_ydata()[0] == (tree[7, 2] + tree[8, 2]) / 2


def test_numbers_stand_over_their_groups(tree):
    labels = qm.cut_linkage(tree, num_groups=5)
    ax = plot_dendrogram(tree, num_groups=5)
    leaves = [int(word) for word in words_of(ax.xaxis)]
    assert sorted(leaves) == list(range(12))
    for number in ax.texts:
        place = np.flatnonzero(labels[leaves] == int(number.get_text()))
        assert np.diff(place).tolist() == [1] * (len(place) - 1)  # side by side
        assert min(place) <= number.get_position()[0] <= max(place)
    assert sorted(int(number.get_text()) for number in ax.texts) == list(range(5))


def test_brackets_stand_on_each_other(tree):
    """Every merge has its height, and its feet are where its branches are joined."""
    brackets = plot_dendrogram(tree).collections[0].get_segments()
    for row, line in zip(tree, brackets, strict=True):
        np.testing.assert_array_equal(line[1:3, 1], row[2])
        for child, foot in zip(row[:2].astype(int), line[[0, 3]], strict=True):
            if child >= 12:
                below = brackets[child - 12]
                assert foot[0] == (below[0, 0] + below[3, 0]) / 2
                assert foot[1] == below[1, 1]
            else:
                assert foot[1] == 0


def test_branches_stand_as_the_text_reads():
    """As far as a tree lets them: here it does."""
    tokens = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    ax = plot_dendrogram(qm.linkage(tokens), words=WORDS[:5])
    assert words_of(ax.xaxis) == WORDS[:5]
    assert not ax.lines


def test_dendrogram_of_a_padded_sequence(rng):
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
    ax = plot_dendrogram(qm.linkage(np.ones((3, 2))), num_groups=2)
    assert ax.lines[0].get_ydata()[0] < 1e-15
    assert len(ax.texts) == 2


def test_similarity_in_group_order(rng):
    tokens = rng.standard_normal((7, 3))
    labels = np.array([2, 0, -1, 1, 0, 2, 2])
    similarity = qm.cosine_similarity(tokens)
    ax = plot_similarity(similarity, labels)
    order = [1, 4, 3, 0, 5, 6]
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(drawn, similarity[np.ix_(order, order)])
    frames = [(*frame.get_xy(), frame.get_width()) for frame in ax.patches]
    assert frames == [(-0.5, -0.5, 2), (1.5, 1.5, 1), (2.5, 2.5, 3)]
    assert words_of(ax.xaxis) == words_of(ax.yaxis) == ["0", "1", "2"]
    assert ax.get_xticks().tolist() == [0.5, 2.0, 4.0]


def test_numbers_of_many_groups_leave_each_other_room():
    ax = plot_similarity(np.eye(50), np.arange(50))
    assert words_of(ax.xaxis) == [str(k) for k in range(0, 50, 3)]


def test_budget_curves():
    budgets = np.array([8, 2, 4])
    errors = np.array([[0.1, 0.4, 0.2], [0.05, 0.3, 0.15]])
    ax = plot_budget(budgets, errors, names=["average", "ward"], max_error=0.15)
    for line, curve in zip(ax.lines, errors[:, [1, 2, 0]], strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [2, 4, 8])
        np.testing.assert_array_equal(line.get_ydata(), curve)
    legend = [text.get_text() for text in ax.get_legend().texts]
    assert legend == ["average, K = 8", "ward, K = 4"]
    rings = [tuple(c.get_offsets()[0]) for c in ax.collections if c.get_offsets().any()]
    assert rings == [(8, 0.1), (4, 0.15)]
    assert [text.get_text() for text in ax.texts] == ["error 0.15"]
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[0] == 0


def test_budget_goes_on_with_other_styles():
    budgets, errors = np.array([2, 4]), np.array([0.2, 0.1])
    ax = plot_budget(budgets, errors, names=["a"], max_error=0.15)
    plot_budget(budgets + 1, 50 * errors, names=["b"], ax=ax)
    first, second = ax.lines
    for part in ("color", "linestyle", "marker"):
        assert getattr(first, f"get_{part}")() != getattr(second, f"get_{part}")()
    assert ax.get_ylim()[1] > 5
    assert len(ax.get_legend().texts) == 2


def test_no_error_is_small_enough():
    ax = plot_budget(np.array([2, 4]), np.array([0.2, 0.1]), max_error=0.05)
    assert [text.get_text() for text in ax.texts] == ["error 0.05"]
    assert ax.get_legend() is None


def calls(tree):
    """Return every function with arrays of one problem."""
    return {
        plot_groups: ((LABELS,), {"words": WORDS}),
        plot_saliency: ((np.linspace(0, 1, 12).reshape(2, 6),), {"words": WORDS}),
        plot_dendrogram: ((tree,), {"num_groups": 3}),
        plot_similarity: ((np.eye(6), LABELS), {}),
        plot_budget: ((np.array([2, 4]), np.array([0.5, 0.25])), {}),
    }


def test_every_function_is_tested_here(tree):
    assert {f.__name__ for f in calls(tree)} == set(plot.__all__)


def pixels(figure):
    figure.set_size_inches(4, 3)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()


@pytest.mark.parametrize("name", plot.__all__)
def test_on_the_axes_given_and_never_shown(monkeypatch, tree, name):
    monkeypatch.setattr(plt, "show", None)
    function = getattr(plot, name)
    arrays, options = calls(tree)[function]
    figure, (left, right) = plt.subplots(1, 2)
    assert function(*arrays, **options, ax=right) is right
    assert not left.has_data()
    assert right.has_data()
    assert plt.get_fignums() == [figure.number]
    function(*arrays, **options)
    assert len(plt.get_fignums()) == 2
    with pytest.raises(TypeError, match="`ax` must be matplotlib axes, got Figure"):
        function(*arrays, **options, ax=figure)


@pytest.mark.parametrize("name", plot.__all__)
def test_arrays_of_any_library(library, tree, name):
    function = getattr(plot, name)
    arrays, options = calls(tree)[function]
    wanted = pixels(function(*arrays, **options).figure)
    given = [to_library(library, x) for x in arrays]
    got = pixels(function(*given, **options).figure)
    np.testing.assert_array_equal(got, wanted)
    with pytest.raises(TypeError, match="must be an array"):
        function(arrays[0].tolist(), *arrays[1:], **options)


def test_what_the_door_finds_on_a_gpu_is_copied(monkeypatch):
    class OnGPU:
        def get(self):
            return LABELS

    monkeypatch.setattr(drawing, "enter", lambda labels: (None, OnGPU()))
    assert list(arcs_of(plot_groups(OnGPU()))) == ["group 3", "group 4"]


def test_half_precision(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = rng.random((2, 6))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = values.astype(dtype)
        drawn = plot_saliency(narrow).images[0].get_array()
        np.testing.assert_array_equal(drawn, narrow.astype(np.float32))


ONES = np.ones(6)
PATCHES = {"grid": (2, 3)}


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"),
    [
        ("groups", [LABELS], {"grid": (2, 2)}, r"\(N\) = \(4,\), got \(6,\)"),
        ("groups", [LABELS], {"words": ["to"]}, r"\(N\) = \(1,\), got \(6,\)"),
        ("groups", [LABELS[None]], {}, r"\(N\) = \(6,\), got \(1, 6\)"),
        ("groups", [LABELS - 9], {}, "`labels` must lie in -1"),
        ("groups", [LABELS], {"grid": (-2, -3)}, "`grid` must be 1 or more"),
        ("groups", [LABELS], {"picture": np.eye(6)}, "needs the `grid`"),
        ("groups", [LABELS], {"words": WORDS, **PATCHES}, "`grid` or `words`"),
        ("groups", [LABELS], {"picture": np.ones((4, 6, 4)), **PATCHES}, "H, W, 3"),
        ("groups", [LABELS], {"picture": np.full((4, 6), np.inf), **PATCHES}, "finite"),
        ("saliency", [np.ones((1, 2, 3))], {}, r"\(N\) or \(L, N\)"),
        ("saliency", [np.ones((2, 3))], PATCHES, r"shape \(N\), got \(2, 3\)"),
        ("saliency", [np.ones(5)], PATCHES, r"\(N\) = \(6,\), got \(5,\)"),
        ("saliency", [np.ones(5)], {"words": WORDS}, "must name 5 tokens, got 6"),
        ("saliency", [ONES], {"words": WORDS, **PATCHES}, "`grid` or `words`"),
        ("saliency", [np.full(6, np.inf)], {}, "must be finite"),
        ("dendrogram", [np.ones((3, 4))], {}, "every group once at most"),
        ("similarity", [np.ones((2, 3)), LABELS], {}, r"\(N, N\) = \(2, 2\)"),
        ("similarity", [np.eye(2), LABELS], {}, r"\(N\) = \(2,\), got \(6,\)"),
        ("similarity", [np.eye(6), 0 * LABELS - 1], {}, "at least one token"),
        ("budget", [LABELS - 1, ONES], {}, "`budgets` must lie in 1"),
        ("budget", [LABELS, np.ones((2, 5))], {}, r"\(C, M\) = \(2, 6\)"),
        ("budget", [LABELS, -ONES], {}, "`errors` must be ≥ 0"),
        ("budget", [LABELS, ONES], {"names": WORDS}, "must name 1 curves, got 6"),
        ("budget", [LABELS, ONES], {"max_error": -1}, "`max_error` must lie in"),
    ],
)
def test_wrong_values(name, arrays, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(plot, f"plot_{name}")(*arrays, **options)
    assert not plt.get_fignums()  # nothing is drawn before


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"),
    [
        ("groups", [ONES], {}, "`labels` must be integers"),
        ("groups", [LABELS], {"grid": 6}, "two integers"),
        ("groups", [LABELS], {"grid": (2, 3.0)}, "`grid` must be an integer"),
        ("groups", [LABELS], {"picture": LABELS[None], **PATCHES}, "float16"),
        ("saliency", [LABELS], {}, "`saliency` must be float16"),
        ("budget", [ONES, ONES], {}, "`budgets` must be integers"),
        ("budget", [LABELS, ONES], {"max_error": "low"}, "must be a number"),
    ],
)
def test_wrong_kinds(name, arrays, options, message):
    with pytest.raises(TypeError, match=message):
        getattr(plot, f"plot_{name}")(*arrays, **options)
    assert not plt.get_fignums()


def test_dendrograms_of_a_batch_and_of_another_mask(rng):
    tokens = rng.standard_normal((2, 5, 3))
    with pytest.raises(ValueError, match=r"shape \(N - 1, 4\), got \(2, 4, 4\)"):
        plot_dendrogram(qm.linkage(tokens))
    mask = np.array([True, True, True, False, True])
    with pytest.raises(ValueError, match="give the `mask`"):
        plot_dendrogram(qm.linkage(tokens[0], mask=mask))
    with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
        plot_dendrogram(qm.linkage(tokens[0]), num_groups=6)


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import qm_cupy.plot"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'qm_cupy.plot needs matplotlib: pip install "qm-cupy[demo]"' in done.stderr
