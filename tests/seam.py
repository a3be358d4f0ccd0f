"""The seam between the library and a GPU, which tests replace.

`cuda` has every name of the modules of `qm_cupy.cuda`, and of those modules of
`qm_cupy.arrays` that know GPUs. Setting a name replaces it in every module that has
imported it, so ``monkeypatch.setattr(cuda, "launch", stand_in)`` works wherever the
name is used.
"""

import importlib
import pkgutil
import sys

import qm_cupy
from qm_cupy import settings
from qm_cupy.arrays import conversion, dtypes, libraries
from qm_cupy.cuda import compile as compilation
from qm_cupy.cuda import constants, device, launch, tiles

_MODULES = (
    constants,
    compilation,
    device,
    launch,
    tiles,
    libraries,
    dtypes,
    conversion,
    settings,
)
# All modules are imported now. One that is imported later would import a replacement,
# and would keep it after the test.
# These need torch, JAX, transformers or matplotlib, which may be missing.
_LEFT_OUT = (
    "qm_cupy.torch",
    "qm_cupy.jax",
    "qm_cupy.transformers",
    "qm_cupy.autodiff.",
    "qm_cupy.plot",
)


def _import_all(package):
    """Import the modules of a package and of those in it."""
    # Not pkgutil.walk_packages, which imports every package to look into it.
    for entry in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if entry.name.startswith((*_LEFT_OUT, "qm_cupy.__main__")):
            continue
        module = importlib.import_module(entry.name)
        if entry.ispkg:
            _import_all(module)


_import_all(qm_cupy)


_BEFORE = {}  # the values of each name before it was set, the latest last


class _Seam:
    def __getattr__(self, name):
        # The first module that has the name: later ones import it from there.
        for module in _MODULES:
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(f"no module of the seam has a {name!r}")

    def __setattr__(self, name, value):
        _BEFORE.setdefault(name, []).append(getattr(self, name))
        _replace(name, value)

    def __delattr__(self, name):
        """Undo the latest change: pytest deletes what was not set on the instance."""
        _replace(name, _BEFORE[name].pop())


def _replace(name, value):
    current = getattr(cuda, name)
    for key, module in list(sys.modules.items()):
        # By identity: another object of the same name in a module is not the
        # seam's.
        if key.startswith("qm_cupy.") and vars(module).get(name) is current:
            setattr(module, name, value)


cuda = _Seam()
