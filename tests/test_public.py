"""The public face: names, docstrings, and what an import costs in imports."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import gpu_calls
import pytest

import qm_cupy

# Modules with names that are not public, or (torch, jax) public once more.
LEFT_OUT = "atomic_write", "settings", "torch", "jax"


def public_modules():
    for module in pkgutil.iter_modules(qm_cupy.__path__):
        if not module.name.startswith("_") and module.name not in LEFT_OUT:
            yield importlib.import_module(f"qm_cupy.{module.name}")


def inner_modules():
    """Give the modules of the inner packages."""
    for module in pkgutil.walk_packages(qm_cupy.__path__, "qm_cupy."):
        if module.name.count(".") > 1:
            yield importlib.import_module(module.name)


def public_names(module):
    return {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and f"{getattr(thing, '__module__', '')}.".startswith(f"{module.__name__}.")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
    }


def of_their_own():
    """The modules that users import by name, `qm_cupy.plot` for one."""
    return [module for module in public_modules() if hasattr(module, "__all__")]


def test_all_holds_every_public_name():
    """What has an example for users: others are the library's own."""
    names = sorted(qm_cupy.__all__)
    assert names == sorted(set(names))
    assert all(hasattr(qm_cupy, name) for name in names)
    modules = [*public_modules(), *inner_modules()]
    for module in modules:
        if hasattr(module, "__all__") or module.__name__.startswith("qm_cupy.plot."):
            continue
        for name in public_names(module) - set(names):
            assert ">>> " not in (getattr(module, name).__doc__ or ""), name


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


def test_gpu_calls_have_every_public_function():
    """Parity on a GPU, streams and launches are tested for what is called there."""
    called = {name.split(",")[0] for name in gpu_calls.calls(1)}
    functions = {
        name
        for name in qm_cupy.__all__
        if inspect.isfunction(getattr(qm_cupy, name)) and name != "warmup"
    }
    elsewhere = {"gumbel_noise", "token_budget"}  # of numbers
    elsewhere |= {"decode", "quickmerge_inference"}  # of models, by the calls of priors
    assert functions - elsewhere <= called


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
