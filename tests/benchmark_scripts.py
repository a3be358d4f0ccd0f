"""The scripts of benchmarks/ as modules, and helpers that several tests use."""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
# An error after which the process has lost the GPU.
ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"


_NAMES = "guard", "kernels", "machine", "overhead", "pipeline", "report"
_NAMES += "resources", "timing", "whole_calls", "workload"


@contextmanager
def loaded(*names):
    """Yield modules of benchmarks/, by default those of kernels and pipelines."""
    # They import each other by name, so the folder must be on the path.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        # transformers looks for a package of this name, and imports the folder with the
        # CUDA sources instead.
        patch.delitem(sys.modules, "kernels", raising=False)
        names = names or _NAMES
        yield types.SimpleNamespace(**{name: __import__(name) for name in names})


def run_main(monkeypatch, module, *arguments):
    """Run a script's `main` with these arguments, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return module.main()


class Array(np.ndarray):
    """A NumPy array with `get`, which kernels.py calls on CuPy arrays."""

    def get(self):
        return np.asarray(self)


def failing(error):
    """Return a function that raises `error`, whatever its arguments."""

    def run(*_):
        raise error

    return run
