"""The order of the sources: layers, pages, names and lengths."""

import inspect
from pathlib import Path

import house
import pytest

import qm_cupy as qm

ROOT = Path(__file__).parent.parent
PACKAGE = house.read(ROOT / "qm_cupy")
GRAPH = house.import_graph(PACKAGE)
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in ROOT.glob("qm_cupy/stages/**/*.py")
    if path.stem != "__init__"
}
MAX_LINES = 450

# Which package may import which others, besides itself. Only `__main__` imports `cli`,
# and nothing imports `torch` and `jax`, so that the library works without them.
LAYERS = {
    name: tuple(row.split())
    for name, row in {
        "__main__": "cli",
        "cli": "qm_cupy corpus files plot results stages priors atomic_write arrays "
        "host_memory install_advice",
        "torch": "paper pipeline stages priors results",
        "jax": "paper priors",
        "transformers": "caches arrays",
        "qm_cupy": "api",
        "api": "paper choice pipeline language_models caches stages priors results "
        "cuda settings",
        "plot": "results stages arrays install_advice",
        "corpus": "pipeline composition group_counts sources results stages files cuda "
        "arrays settings progress memory host_memory",
        "paper": "pipeline stages priors results autodiff arrays",
        "choice": "pipeline stages priors results arrays",
        "pipeline": "stage_progress memory composition group_counts sources stages "
        "results autodiff cuda arrays progress",
        "memory": "composition sources stages arrays",
        "stage_progress": "composition sources stages arrays progress",
        "composition": "group_counts sources stages results autodiff arrays settings",
        "group_counts": "stages cuda arrays autodiff",
        "sources": "stages arrays settings",
        "results": "merged_file stages autodiff cuda arrays",
        "language_models": "caches stages priors cuda arrays install_advice",
        "caches": "stages cuda arrays settings progress",
        "stages": "priors autodiff cuda arrays settings progress host_memory",
        "priors": "atomic_write cuda arrays settings install_advice",
        "autodiff": "arrays settings",
        "cuda": "arrays settings install_advice",
        "arrays": "settings install_advice",
        "merged_file": "files atomic_write",
        "files": "atomic_write arrays",
        "atomic_write": "",
        "install_advice": "",
        "settings": "",
        "progress": "",
        "host_memory": "",
    }.items()
}

# Public functions whose page has another name.
PAGE_OF = {
    "group_sizes": "groups",
    "group_positions": "groups",
    "token_budget": "budget",
    "norm_budget": "budget",
}
# The parts of a page that a public function does not need, and why.
WITHOUT = {
    "token_budget": {"reference", "launcher"},  # computes with numbers, not arrays
    "norm_budget": {"launcher"},  # uses that of `token_norms`, and NumPy
    "gumbel_noise": {"launcher"},  # always NumPy; kernels draw their own noise
    "norm_saliency": {"launcher"},  # uses those of `token_norms` and `saliency`
    "group_sizes": {"launcher"},  # one launcher for both
    "group_positions": {"launcher"},
    "linkage": {"launcher"},  # it is in linkage_cuda.py
    "decode": {"reference", "launcher"},  # the model computes
    "fidelity_loss": {"reference", "launcher"},  # uses `reconstruction_error`
    "fidelity_loss_vjp": {"reference", "launcher"},
}
# Kernels of modules that have another name.
KERNELS_OF = {"counts": "launch", "single_linkage": "linkage_cuda"}


def test_nothing_private_is_imported_across_files():
    sources = {
        name: text
        for name, text in house.read(
            ROOT / "qm_cupy", ROOT / "tests", ROOT / "benchmarks"
        ).items()
        if house.part(name) != "cupy" and not name.startswith("cupy.")  # replaces CuPy
    }
    assert house.private_uses(sources) == []


# With a cycle it depends on the first import whether all of them work.
def test_imports_have_no_cycle():
    assert house.circle(GRAPH) is None


# The layers allow any import of a lower package, but training is for priors only.
def test_imports_run_downwards():
    assert house.crossings(GRAPH, LAYERS) == []
    training = {
        x for x, targets in GRAPH.items() if "qm_cupy.priors.training" in targets
    }
    assert {house.part(name) for name in training} <= {"priors"}


def test_the_layers_are_those_of_the_package():
    assert set(LAYERS) == {house.part(name) for name in PACKAGE}
    assert house.circle(LAYERS) is None
    used = {name: set() for name in LAYERS}
    for name, targets in GRAPH.items():
        used[house.part(name)] |= {house.part(x) for x in targets}
    for name, row in LAYERS.items():
        # The table is exact, so that it also documents the imports.
        assert set(row) == used[name] - {name}, name  # no entry that is not needed


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in qm.__all__
        if inspect.isfunction(function := getattr(qm, name))
        if function.__module__.startswith("qm_cupy.stages.")
    ],
)
def test_every_operation_has_its_page(name):
    page = PAGE_OF.get(name, name.removesuffix("_vjp"))
    assert page in PAGES
    # A reader finds the function, its reference and its launcher in one file.
    assert house.missing_from_page(name, PAGES[page]) == WITHOUT.get(name, set())


def test_every_kernel_file_has_a_page_and_a_basic_version():
    """The basic version of `single_linkage` is `linkage`."""
    modules = {name.rpartition(".")[2] for name in PACKAGE}
    for path in ROOT.glob("kernels/*/*.cu"):
        page = KERNELS_OF.get(path.stem, path.stem.removesuffix("_vjp"))
        assert page in modules, path
        basic = path.stem.removeprefix("single_")
        assert (ROOT / "kernels" / "basic" / f"{basic}.cu").exists(), path


def test_every_page_has_its_tests():
    """A page without a public function is tested by the tests of its folder."""
    for path in ROOT.glob("qm_cupy/stages/**/*.py"):
        if path.stem == "__init__":
            continue
        if house.functions(PAGES[path.stem]) & set(qm.__all__):
            files = ROOT.glob(f"tests/**/test_{path.stem}*.py")
        else:
            files = ROOT.glob(f"tests/stages/{path.parent.name}/test_*.py")
        assert any(files), path


def test_no_file_is_long():
    files = [*ROOT.glob("qm_cupy/**/*.py"), *ROOT.glob("kernels/**/*.cu*")]
    assert house.long_files(files, MAX_LINES) == []


class TestHouse:
    """Each check reports what it must, in small sources that break the rule."""

    def test_private_uses(self):
        # Each form of import can use the private function `_f`. Dunder names and
        # attributes of other objects are allowed.
        sources = {
            "p": "",
            "p.a": "def _f(): ...\ng = _f()",
            "p.b": "from .a import _f, g\nfrom .a import __doc__",
            "p.c": "from . import a as b\nb.g(), b._f(), b.__name__, b.g._asdict()",
            "p.d": "import p.a\np.a._f()\nself._f()",
            "p.e": "def f():\n    from p import a\n    return a._f.cache",
            "p.f": "from . import _hidden\nimport p._hidden\nfrom ._hidden import h",
            "p._hidden": "h = 1",
            "t": "import numpy as np\nimport p.a as q\nnp._x, q._f",
        }
        users = "bcde"
        assert house.private_uses(sources) == sorted(
            [f"p.{x} uses p.a._f" for x in users]
            + ["p.f uses p._hidden"]
            + ["t uses p.a._f"]
        )

    def test_import_graph(self):
        # Relative imports of one, two and three dots, and
        # an import inside a function.
        sources = {
            "p": "from .a import f\nfrom . import q",
            "p.a": "import os.path",
            "p.q": "from .deep import x",
            "p.q.deep": "def f():\n    from ..a import f\n    from ... import nothing",
            "p.r": "import p.q.deep\nfrom . import __version__\nfrom os import path",
        }
        assert house.import_graph(sources) == {
            "p": {"p.a", "p.q"},
            "p.a": set(),
            "p.q": {"p.q.deep"},
            "p.q.deep": {"p.a"},
            "p.r": {"p.q.deep", "p"},
        }

    def test_circle(self):
        sources = {"p.a": "from . import b", "p.b": "import json", "p": ""}
        assert house.circle(house.import_graph(sources)) is None
        sources["p.b"] = "def late():\n    from .a import f"  # also inside a function
        assert set(house.circle(house.import_graph(sources))) == {"p.a", "p.b"}

    def test_crossings(self):
        # `high` is above `low`; `new` has no row in the table.
        graph = {
            "qm_cupy": {"qm_cupy.low.a", "qm_cupy.high"},
            "qm_cupy.high": {"qm_cupy.low.a"},
            "qm_cupy.low.a": {"qm_cupy.low.b", "qm_cupy.high", "qm_cupy"},
            "qm_cupy.new": {"qm_cupy.low"},
        }
        allowed = {"qm_cupy": ("low",), "high": ("low",), "low": ()}
        assert house.crossings(graph, allowed) == [
            "qm_cupy imports qm_cupy.high",
            "qm_cupy.low.a imports qm_cupy",
            "qm_cupy.low.a imports qm_cupy.high",
            "qm_cupy.new imports qm_cupy.low",
        ]

    def test_missing_from_page(self):
        # An imported launcher counts, and a private reference counts too.
        page = "from .x import f_cuda\ndef f(): ...\ndef _f_reference(): ..."
        assert house.missing_from_page("f", page) == set()
        assert house.missing_from_page("g", page) == {
            "function",
            "reference",
            "launcher",
        }

    def test_long_files(self, tmp_path):
        (tmp_path / "a.py").write_text("x = 1\n" * 3)
        (tmp_path / "b.py").write_text("x = 1\n" * 4)  # one line too many
        assert house.long_files(tmp_path.glob("*.py"), 3) == ["b.py has 4 lines"]

    def test_read(self, tmp_path):
        (tmp_path / "p" / "q").mkdir(parents=True)
        for file in ("p/__init__.py", "p/q/__init__.py", "p/q/a.py", "alone.py"):
            (tmp_path / file).write_text(f"name = {file!r}")
        # `alone` is in no package.
        assert {*house.read(tmp_path)} == {"p", "p.q", "p.q.a", "alone"}
