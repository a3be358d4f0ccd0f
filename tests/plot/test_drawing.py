"""Properties of every picture: its axes, and arrays of any library."""

import subprocess
import sys

import numpy as np
import pytest
from artists import CALLS, LABELS, arcs_of, closed, pixels  # noqa: F401
from conftest import to_library
from matplotlib import pyplot as plt

import qm_cupy as qm
from qm_cupy import plot
from qm_cupy.plot import drawing, plot_groups


def test_every_function_is_tested_here():
    assert set(CALLS) == set(plot.__all__)


@pytest.mark.parametrize("name", plot.__all__)
def test_pictures_use_the_axes_argument_and_are_not_shown(monkeypatch, name):
    """A library function draws; only the caller opens a window."""
    monkeypatch.setattr(plt, "show", None)  # a call of it would raise TypeError
    function = getattr(plot, name)
    arrays, options = CALLS[name]
    figure, (left, right) = plt.subplots(1, 2)
    assert function(*arrays, **options, ax=right) is right
    assert not left.has_data()
    assert right.has_data()
    assert plt.get_fignums() == [figure.number]  # no other figure
    function(*arrays, **options)
    assert len(plt.get_fignums()) == 2  # without axes: a new figure
    with pytest.raises(TypeError, match="`ax` must be matplotlib axes, got Figure"):
        function(*arrays, **options, ax=figure)


@pytest.mark.parametrize("name", plot.__all__)
def test_arrays_of_any_library(library, name):
    function = getattr(plot, name)
    arrays, options = CALLS[name]
    wanted = pixels(function(*arrays, **options).figure)
    # Equal pixels: the arrays were read completely and in the same order.
    inputs = [to_library(library, x) for x in arrays]
    got = pixels(function(*inputs, **options).figure)
    np.testing.assert_array_equal(got, wanted)
    with pytest.raises(TypeError, match="must be an array"):
        function(arrays[0].tolist(), *arrays[1:], **options)


def test_arrays_on_a_gpu_are_copied(monkeypatch):
    """matplotlib reads NumPy arrays only; CuPy's arrays have the method `get`."""

    class OnGPU:
        def get(self):
            return LABELS

    monkeypatch.setattr(drawing, "convert_inputs", lambda labels: (None, OnGPU()))
    assert list(arcs_of(plot_groups(OnGPU()))) == ["group 3", "group 4"]


def test_without_matplotlib():
    """The error of the import has the command that installs matplotlib."""
    # None in sys.modules makes an import fail. A new process has not imported it yet.
    code = "import sys; sys.modules['matplotlib'] = None; import qm_cupy.plot"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'qm_cupy.plot needs matplotlib: pip install "matplotlib>=' in done.stderr


@pytest.mark.parametrize("name", ["plot_groups", "plot_saliency", "plot_similarity"])
class TestMerged:
    """A `Merged` stands for the field that the plot draws."""

    @staticmethod
    def draw(name, field):
        arrays = (np.eye(6), field) if name == "plot_similarity" else (field,)
        return getattr(plot, name)(*arrays)

    def test_one_sequence(self, name, library, rng):
        tokens = rng.standard_normal((1, 6, 3)).astype(np.float32)
        weights = rng.random((1, 6)).astype(np.float32)
        batch = qm.quickmerge(tokens, 4, weights=weights)
        single = qm.Merged(*(x[0] for x in batch))
        if name == "plot_saliency":
            wanted = pixels(plot.plot_saliency(single.mass, label="weight").figure)
        else:
            wanted = pixels(self.draw(name, single.labels).figure)
        for merged in (batch, single):  # B = 1, and without the axis B
            merged = qm.Merged(*(to_library(library, x) for x in merged))
            np.testing.assert_array_equal(
                pixels(self.draw(name, merged).figure), wanted
            )

    def test_a_batch(self, name, rng):
        merged = qm.quickmerge(rng.standard_normal((2, 6, 3)), 4)
        field = "mass" if name == "plot_saliency" else "labels"
        argument = "saliency" if name == "plot_saliency" else "labels"
        message = rf"`{argument}` must be of one .* B = 2: pass `merged\.{field}\[b\]`"
        with pytest.raises(ValueError, match=message):
            self.draw(name, merged)
