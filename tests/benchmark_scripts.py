"""The scripts of benchmarks/ as modules, and what their tests share."""

import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"


@contextmanager
def loaded():
    """Give the benchmarks' modules, which are scripts beside each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = "guard", "kernels", "machine", "overhead", "pipeline", "report"
        names += "resources", "timing", "whole_calls", "workload"
        yield types.SimpleNamespace(**{name: __import__(name) for name in names})


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return module.main()


class Array(np.ndarray):
    """NumPy's array with what kernels.py asks of CuPy's."""

    def get(self):
        return np.asarray(self)


def failing(error):
    def run(*_):
        raise error

    return run
