"""The public interface: its names, docstrings and examples."""

import importlib
import inspect
import pkgutil

import cache_calls
import gpu_calls
import pytest

import qm_cupy

# Modules whose names are not public, or are public in `qm_cupy` too (api), or that need
# other packages.
LEFT_OUT = "api", "atomic_write", "settings", "torch", "jax", "transformers"


def public_modules():
    for module in pkgutil.iter_modules(qm_cupy.__path__):
        if not module.name.startswith("_") and module.name not in LEFT_OUT:
            yield importlib.import_module(f"qm_cupy.{module.name}")


def inner_modules():
    """Yield the modules of the inner packages."""
    for module in pkgutil.walk_packages(qm_cupy.__path__, "qm_cupy."):
        # Those of transformers need this package, which may be missing.
        inner = module.name.count(".") > 1
        if inner and not module.name.startswith("qm_cupy.transformers."):
            yield importlib.import_module(module.name)


def public_names(module):
    """Return the functions and classes that a module defines, not those it imports."""
    return {
        name
        for name, item in vars(module).items()
        if not name.startswith("_")
        and f"{getattr(item, '__module__', '')}.".startswith(f"{module.__name__}.")
        and (inspect.isfunction(item) or inspect.isclass(item))
    }


def modules_with_names():
    """Return the modules that users import by name, such as `qm_cupy.plot`."""
    return [module for module in public_modules() if hasattr(module, "__all__")]


def test_all_contains_every_public_name():
    """A function with an example is for users; the others are internal."""
    names = sorted(qm_cupy.__all__)
    assert names == sorted(set(names))
    assert all(hasattr(qm_cupy, name) for name in names)
    modules = [*public_modules(), *inner_modules()]
    for module in modules:
        if hasattr(module, "__all__") or module.__name__.startswith("qm_cupy.plot."):
            continue
        for name in public_names(module) - set(names):
            assert ">>> " not in (getattr(module, name).__doc__ or ""), name


def test_named_modules_list_their_public_names():
    assert "qm_cupy.plot" in [module.__name__ for module in modules_with_names()]
    for module in modules_with_names():
        assert sorted(public_names(module)) == module.__all__
        assert not set(module.__all__) & set(qm_cupy.__all__)  # one name, one page


@pytest.mark.parametrize(
    "module", [qm_cupy, *modules_with_names()], ids=lambda module: module.__name__
)
def test_public_functions_have_runnable_examples(module):
    for name in module.__all__:
        item = getattr(module, name)
        if inspect.isfunction(item) and name != "warmup":  # warmup needs a GPU
            assert ">>> " in (item.__doc__ or ""), name
            assert "Raises" in item.__doc__ or name == "check_finite", name


def test_gpu_calls_have_every_public_function():
    """The tests of parity, streams and launches take their calls from that table."""
    called = {name.split(",")[0] for name in gpu_calls.calls(1)}
    called |= cache_calls.FUNCTIONS
    functions = {
        name
        for name in qm_cupy.__all__
        if inspect.isfunction(getattr(qm_cupy, name)) and name != "warmup"
    }
    elsewhere = {"gumbel_noise", "token_budget"}  # they take no arrays
    elsewhere |= {"decode", "quickmerge_inference"}  # the calls of priors run them
    assert functions - elsewhere <= called


def test_options_are_keywords():
    """Arrays and counts are positional; everything after `*` needs its name."""
    for name in ("quickmerge", "cluster_tokens", "merge_tokens", "query_key_entropy"):
        arguments = inspect.signature(getattr(qm_cupy, name)).parameters.values()
        # A new option can then be added anywhere without breaking a call.
        options = [p for p in arguments if p.name not in ("num_groups", "budget")]
        with_default = [p for p in options if p.default is not p.empty]
        assert all(p.kind is p.KEYWORD_ONLY for p in with_default), name
