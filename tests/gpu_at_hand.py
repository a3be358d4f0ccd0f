"""Whether there is a GPU to test on."""

import warnings


def _import_cupy():
    """Return CuPy, or None, and why there is no GPU to test on, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy's, of a CUDA that it cannot find
            import cupy
    except ImportError as error:
        return None, f"needs CuPy: {error}"
    available = cupy.is_available()
    return cupy, None if available else "needs a GPU: cupy.is_available() is False"


cupy, missing = _import_cupy()
