"""QuickMerge++: it turns token sequences into shorter token sequences.

An import of the package alone is fast, because it does not import NumPy. The first use
of a public name imports all of them, from `api.py`.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers read it as True; an import of `typing` is slow
if TYPE_CHECKING:
    from .api import *  # noqa: F403 (all names of `__all__`, and no others)
    from .api import __all__ as __all__
else:
    # Type checkers must not see these functions: with them, every name would exist.

    def __getattr__(name):
        """Import all public names when Python does not find the attribute `name`."""
        # Tools look for optional names such as `__wrapped__`: these need no import.
        if name == "__all__" or not name.startswith("_"):
            # Not `from . import api`, which would call this function for `api`.
            import qm_cupy.api as api

            names = globals()
            for public in ("__all__", *api.__all__):
                # A name that a caller has replaced, such as a test, stays replaced.
                names.setdefault(public, getattr(api, public))
            if name in names:  # a public name, or a module that `api` has imported
                return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        """Return all names, so that editors complete the public ones too."""
        __getattr__("__all__")
        return sorted(globals())
