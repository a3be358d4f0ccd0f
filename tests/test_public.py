"""The public face: names, docstrings, and what an import costs in imports."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qm_cupy


def public_modules():
    """Give all but the two that have these names once more, and the settings.

    Those are in test_torch and test_jax; `settings` has names for the library too.
    """
    others = "torch", "jax", "settings"
    for module in pkgutil.iter_modules(qm_cupy.__path__):
        if not module.name.startswith("_") and module.name not in others:
            yield importlib.import_module(f"qm_cupy.{module.name}")


def public_names(module):
    return {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and getattr(thing, "__module__", None) == module.__name__
        and (inspect.isfunction(thing) or inspect.isclass(thing))
    }


def of_their_own():
    """The modules that users import by name, `qm_cupy.plot` for one."""
    return [module for module in public_modules() if hasattr(module, "__all__")]


def test_all_holds_every_public_name():
    stages = [module for module in public_modules() if not hasattr(module, "__all__")]
    public = set().union(*map(public_names, stages))
    settings = {"allow_tf32", "check_finite", "use_kernels", "warmup"}
    settings.add("KernelCompilationError")
    assert public | settings == set(qm_cupy.__all__)
    assert sorted(qm_cupy.__all__) == sorted(set(qm_cupy.__all__))


def test_modules_of_their_own_hold_their_public_names():
    assert "qm_cupy.plot" in [module.__name__ for module in of_their_own()]
    for module in of_their_own():
        assert sorted(public_names(module)) == module.__all__
        assert not set(module.__all__) & set(qm_cupy.__all__)


@pytest.mark.parametrize(
    "module", [qm_cupy, *of_their_own()], ids=lambda module: module.__name__
)
def test_public_functions_have_runnable_examples(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) and name != "warmup":  # which takes a GPU
            assert ">>> " in (thing.__doc__ or ""), name
            assert "Raises" in thing.__doc__ or name == "check_finite", name


def test_every_stage_has_a_reference_and_kernels():
    """One stem: qm_cupy/<stage>.py, kernels/basic/<stage>.cu, tests/test_<stage>.py.

    Clustering has more to it: launchers, and kernels, in files of their own.
    """
    parts = dict.fromkeys(("groups", "matching", "contiguous"), "matching")
    parts["linkage"] = "linkage"
    root = Path(__file__).parents[1]
    for file in root.glob("kernels/*/*.cu"):
        stem = file.stem.removeprefix("single_")  # which is plain enough as linkage
        assert (root / "kernels" / "basic" / f"{stem}.cu").exists()
        if stem in parts:
            assert (root / "qm_cupy" / f"_{parts[stem]}_cuda.py").exists()
            assert (root / "tests" / f"test_{parts[stem]}_kernels.py").exists()
        else:
            assert (root / "qm_cupy" / f"{stem}.py").exists()
            assert (root / "tests" / f"test_{stem}.py").exists()


def test_options_are_keywords():
    """Arrays and counts by position; everything after `*` by name only."""
    for name in ("quickmerge", "cluster_tokens", "merge_tokens", "query_key_entropy"):
        kinds = inspect.signature(getattr(qm_cupy, name)).parameters.values()
        with_default = [p for p in kinds if p.default is not p.empty]
        assert all(p.kind is p.KEYWORD_ONLY for p in with_default), name


def test_import_brings_nothing_but_numpy():
    code = (
        "import sys, qm_cupy; "
        "unwanted = {'cupy', 'torch', 'jax', 'ml_dtypes', 'matplotlib', 'scipy'}; "
        "unwanted.add('numpy.random'); "  # NumPy itself loads it when it is used
        "print(unwanted & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
