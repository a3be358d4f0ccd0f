"""Checks the docstrings of everything public against numpydoc: `make lint` runs it.

numpydoc's own command checks every function whose name has no leading underscore. Most
of those belong to the library's internals.
"""

import inspect
import sys

from numpydoc.validate import validate

import qm_cupy
import qm_cupy.plot

# Rules that do not fit this library: extended summaries and cross-references
# everywhere, the imperative mood, and rules of taste about how results are listed.
IGNORED = {
    "GL01", "GL08", "ES01", "EX01", "SA01", "SS05", "SS06", "RT02", "RT04", "RT05",
    "PR08", "PR09",
}  # fmt: skip
# Their methods have pages.
METHODS = (
    qm_cupy.MLPPrior, qm_cupy.TransformerPrior, qm_cupy.LanguageModel,
    qm_cupy.ModelState,
)  # fmt: skip


def public():
    """Yield the full names of public functions, and of methods that have pages."""
    for module in (qm_cupy, qm_cupy.plot):
        for name in module.__all__:
            item = getattr(module, name)
            if inspect.isfunction(item):
                yield f"{module.__name__}.{name}"
            # Methods without a docstring of their own inherit it, so they have no
            # page.
            elif item in METHODS:
                for method, function in vars(item).items():
                    if not method.startswith("_") and function.__doc__:
                        yield f"{module.__name__}.{name}.{method}"


def main():
    failed = False
    for name in public():
        for code, message in validate(name)["errors"]:
            if code not in IGNORED:
                print(f"{name}: {code} {message}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
