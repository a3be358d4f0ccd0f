"""List the public names of CuPy, so that the stand-in cannot have any other name.

``python -P tests/rehearsal/names.py`` prints ``names.txt`` if CuPy itself is installed;
it needs no GPU. Without ``-P`` it would import the stand-in in the same folder.
"""

import functools
import re
import sys
import textwrap
import types

MODULES = "", "cuda", "cuda.runtime", "cuda.compiler", "random", "linalg"
CLASSES = (
    "ndarray", "RawKernel", "RawModule", "cuda.Stream", "cuda.Event", "cuda.Graph",
    "cuda.Device", "cuda.MemoryPool", "cuda.MemoryPointer", "cuda.Memory",
    "cuda.UnownedMemory",
)  # fmt: skip


def names(cupy: types.ModuleType) -> dict[str, set[str]]:
    """Return the public names of modules and classes, with methods such as __add__."""
    result = {}
    for path in MODULES + CLASSES:
        owner = functools.reduce(getattr, filter(None, path.split(".")), cupy)
        offered = set(getattr(owner, "__all__", dir(owner)))
        # In modules, names with a leading underscore are private. In classes, names
        # such as __add__ are part of the interface.
        hidden = "_" if path in MODULES else "_[^_]"
        offered = {name for name in offered if not re.match(hidden, name)}
        result[f"cupy.{path}".rstrip(".")] = offered
    return result


def main() -> None:
    import cupy

    # One paragraph for each module or class, which starts with its name and a colon.
    lines = [f"CuPy {cupy.__version__}"]
    for owner, offered in names(cupy).items():
        listed = f"{owner}: {' '.join(sorted(offered))}"
        lines += textwrap.wrap(listed, 88, break_on_hyphens=False)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
