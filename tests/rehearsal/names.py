"""What CuPy offers by name, so that the stand-in offers nothing else.

``python -P tests/rehearsal/names.py`` prints ``names.txt`` where CuPy itself is
installed; it needs no GPU. Without ``-P`` it would import the stand-in beside it.
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
    """Return the public names of modules and classes, __add__ and its like included."""
    found = {}
    for path in MODULES + CLASSES:
        owner = functools.reduce(getattr, filter(None, path.split(".")), cupy)
        offered = set(getattr(owner, "__all__", dir(owner)))
        hidden = "_" if path in MODULES else "_[^_]"
        offered = {name for name in offered if not re.match(hidden, name)}
        found[f"cupy.{path}".rstrip(".")] = offered
    return found


def main() -> None:
    import cupy

    lines = [f"CuPy {cupy.__version__}"]
    for owner, offered in names(cupy).items():
        listed = f"{owner}: {' '.join(sorted(offered))}"
        lines += textwrap.wrap(listed, 88, break_on_hyphens=False)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
