"""Says whether the machine has a GPU to test on."""

import warnings


def _import_cupy():
    """Return CuPy or None, and the reason why there is no GPU to test on or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns if it finds no CUDA
            import cupy
    except ImportError as error:
        return None, f"needs CuPy: {error}"
    # CuPy imports on a machine without a GPU too, so the import alone says little.
    available = cupy.is_available()
    return cupy, None if available else "needs a GPU: cupy.is_available() is False"


cupy, missing = _import_cupy()
