"""The seam between the library and a GPU, which tests replace.

`cuda` has every name of the modules of `qm_cupy.cuda`, and those of `qm_cupy.arrays`
that know GPUs. To set one replaces it in every module that has imported it, so
``monkeypatch.setattr(cuda, "launch", stand_in)`` works wherever the name is used.
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
# All pages, now: a module that is imported later would keep what it finds then.
_LEFT_OUT = "qm_cupy.torch", "qm_cupy.jax", "qm_cupy.autodiff.", "qm_cupy.plot"
for _module in pkgutil.walk_packages(qm_cupy.__path__, "qm_cupy."):
    if not _module.name.startswith((*_LEFT_OUT, "qm_cupy.__main__")):
        importlib.import_module(_module.name)


_BEFORE = {}  # what each name stood for before it was set, the latest last


class _Seam:
    def __getattr__(self, name):
        for module in _MODULES:
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(f"no module of the seam has a {name!r}")

    def __setattr__(self, name, value):
        _BEFORE.setdefault(name, []).append(getattr(self, name))
        _replace(name, value)

    def __delattr__(self, name):
        """Undo the latest: pytest deletes what an instance had not itself."""
        _replace(name, _BEFORE[name].pop())


def _replace(name, value):
    now = getattr(cuda, name)
    for key, module in list(sys.modules.items()):
        if key.startswith("qm_cupy.") and vars(module).get(name) is now:
            setattr(module, name, value)


cuda = _Seam()
