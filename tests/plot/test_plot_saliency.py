"""Saliency as shades, read from matplotlib's artists."""

import numpy as np
import pytest
from artists import LABELS, WORDS, closed, luminance, words_of  # noqa: F401
from matplotlib import pyplot as plt

from qm_cupy.plot import plot_saliency

ONES = np.ones(6)
PATCHES = {"grid": (2, 3)}


def test_saliency_by_token_and_layer(rng):
    values = rng.random((6, 4))  # 6 layers, 4 tokens
    ax = plot_saliency(values, words=WORDS[:4], label="entropy, nats")
    np.testing.assert_array_equal(ax.images[0].get_array(), values)
    assert ax.images[0].get_extent() == [-0.5, 3.5, 6.5, 0.5]  # layers count from 1
    assert words_of(ax.xaxis) == WORDS[:4]
    assert ax.images[0].colorbar.ax.get_ylabel() == "entropy, nats"
    assert ax.images[0].get_clim() == (values.min(), values.max())


def test_saliency_of_one_layer_and_its_limits():
    ax = plot_saliency(np.array([0.5, 0.25]), limits=(0, 1))
    assert ax.images[0].get_array().shape == (1, 2)
    assert ax.images[0].get_clim() == (0, 1)  # `limits`, not the range of the values
    assert not ax.get_yticks().size  # one row needs no number


def test_saliency_of_patches():
    values = np.arange(6.0)
    ax = plot_saliency(values, grid=(2, 3))
    np.testing.assert_array_equal(ax.images[0].get_array(), values.reshape(2, 3))
    assert ax.images[0].get_extent() == [0, 3, 2, 0]  # fits the outlines of groups


def test_scale_becomes_lighter():
    """So that a grey print keeps the order of the values."""
    shades = plot_saliency(np.arange(5.0)).images[0].get_cmap()(np.linspace(0, 1, 9))
    light = [luminance(shade[:3]) for shade in shades]
    assert light == sorted(light)


def test_half_precision(rng):
    """matplotlib does not know bfloat16, so the values are widened."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = rng.random((2, 6))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = values.astype(dtype)
        drawn = plot_saliency(narrow).images[0].get_array()
        np.testing.assert_array_equal(drawn, narrow.astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.ones((1, 2, 3))], {}, r"\(N\) or \(L, N\)"),
        ([np.ones((2, 3))], PATCHES, r"shape \(N\), got \(2, 3\)"),
        ([np.ones(5)], PATCHES, r"\(N\) = \(6,\), got \(5,\)"),
        ([np.ones(5)], {"words": WORDS}, "must have length 5, the number"),
        ([ONES], {"words": WORDS, **PATCHES}, "`grid` or `words`"),
        ([np.full(6, np.inf)], {}, "must be finite"),
    ],
)
def test_wrong_values(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        plot_saliency(*arrays, **options)
    assert not plt.get_fignums()  # the check comes before the drawing


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([LABELS], {}, "`saliency` must be float16"),
    ],
)
def test_wrong_types(arrays, options, message):
    with pytest.raises(TypeError, match=message):
        plot_saliency(*arrays, **options)
    assert not plt.get_fignums()
