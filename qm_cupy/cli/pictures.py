"""Pictures of the demo: read from a file, cut into patches, and joined again.

Pillow reads the file. Its own conversion to colours is used only for 8 bits: it would
clip larger numbers, so that 16-bit pictures would become white.
"""

import os
import stat
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..files.inputs import shown
from ..host_memory import available_bytes

# The largest number of tokens. A larger picture has larger patches.
_MAX_TOKENS = 5000
_MIN_PATCH = 8  # the smallest side of a square patch, in pixels
# Memory of the whole demo, measured with pictures of 12 and 80 million pixels. Most of
# it is for float64 copies of the tokens, from which the error is computed.
BYTES_PER_PIXEL = 160

# Numbers of tags, of EXIF and of TIFF.
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the photometric tag and the sample format


def read_picture(path: Path) -> NDArray[Any]:
    """Return the picture of a file, upright, as (height, width, 3) within 0..1.

    Numbers of 8 and 16 bits are divided by their largest possible value. Floats within
    0..1 stay as they are. Other floats, and integers of 32 bits, have no known white:
    their smallest value becomes 0 and their largest value becomes 1. Transparent pixels
    are drawn on white. Of a file with several pictures, the first one is read.

    Raises
    ------
    ValueError
        If the file is not a picture, is damaged, has NaN or Inf, or has a wrong size.
    OSError
        If the file cannot be opened.
    MemoryError
        If the demo needs more memory for this picture than is free.
    """
    from PIL import Image

    name = shown(path)
    # Pillow gets a file without a name: it would map a named one into memory, which
    # gives wrong pixels for TIFF files whose orientation swaps width and height.
    with _open(path, name) as file:
        with _one_line_errors(name):
            image = Image.open(file)  # reads only the header
        _check_size(name, *image.size)
        with _one_line_errors(name):
            image.load()  # reads the pixels, and metadata behind them
            numbers, white = _decode(image)
            orientation = _orientation(image)
    picture = _scale(name, numbers, white)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)  # grey
    return _upright(picture, orientation)


def _open(path: Path, name: str) -> BinaryIO:
    status = path.stat()
    # Opening a pipe would wait for its other end, and a device may have no end.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"--image must be a regular file, got {name}")
    if status.st_size == 0:
        raise ValueError(f"--image {name} is empty: it has 0 bytes")
    return path.open("rb")


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Let an error of Pillow name the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _silence(), warnings.catch_warnings():
            # Warnings are about damaged metadata and do not concern the pixels, except
            # this one: it is an error if there are twice as many pixels.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError as error:
        message = f"--image {name} is not a picture that Pillow can read"
        raise ValueError(message) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(
            f"--image {name} has more than {limit} pixels, the limit of Pillow: make "
            "it smaller"
        ) from error
    except MemoryError as error:
        raise MemoryError(
            f"--image {name} does not fit in memory: make it smaller"
        ) from error
    except Exception as error:  # damaged files cause errors of many types in decoders
        reason = textwrap.shorten(str(error) or type(error).__name__, 120)
        raise ValueError(f"--image {name} cannot be read: {reason}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what libraries of Pillow print: libtiff describes errors on stderr."""
    try:
        stderr = os.dup(2)
    except OSError:  # the process was started without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _check_size(name: str, width: int, height: int) -> None:
    short, long = sorted((width, height))
    size = f"{width} x {height}"
    if short < 2 * _MIN_PATCH:
        raise ValueError(
            f"--image must have 16 x 16 pixels or more, got {size}: {name}"
        )
    if long > _MAX_TOKENS * short:  # even patches as large as the short side are more
        raise ValueError(
            f"the long side of --image may be up to {_MAX_TOKENS} times the short "
            f"side, got {size}: {name}"
        )
    num_bytes, available = BYTES_PER_PIXEL * width * height, available_bytes()
    if available is not None and num_bytes > available:
        raise MemoryError(
            f"--image {name} has {size} pixels, for which the demo needs about "
            f"{num_bytes / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB "
            "are free: make it smaller"
        )


def _decode(image: Any) -> tuple[NDArray[Any], int | None]:
    """Return grey numbers (H, W) or 8-bit colours (H, W, 3), and the number of white.

    White is None if it is unknown.
    """
    if image.mode == "F":
        return np.asarray(image), None
    if not image.mode.startswith("I"):
        return np.asarray(_in_colours(image)), 255
    numbers, tags = np.asarray(image), getattr(image, "tag_v2", None)
    # Old versions of Pillow read 16-bit PNG files in the mode I, which has 32 bits.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        # Pillow reads unsigned integers as signed ones. TIFF's default is unsigned.
        unsigned = tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
        return numbers.view(np.uint32) if unsigned else numbers, None
    bits = 12 if tags and tags.get(_BITS) == (12,) else 16
    white = 2**bits - 1
    if tags and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow does so for 8 bits
        numbers = white - numbers
    transparent = image.info.get("transparency")  # a PNG file may have such a grey
    if transparent is not None:
        numbers = np.where(numbers == transparent, white, numbers)
    return numbers, white


def _in_colours(image: Any) -> Any:
    """Return an image of 8 bits in the mode RGB, on white."""
    from PIL import Image

    if image.mode == "La":  # `convert` knows only this way from it
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _scale(name: str, numbers: NDArray[Any], white: int | None) -> NDArray[Any]:
    """Return numbers within 0..1."""
    if white is not None:
        return numbers.astype(np.float32) / white
    low, high = float(numbers.min()), float(numbers.max())  # NaN if there is a NaN
    if not np.isfinite([low, high]).all():
        raise ValueError(
            f"--image {name} contains NaN or Inf: replace them by finite numbers"
        )
    if numbers.dtype.kind == "f" and low >= 0 and high <= 1:
        return numbers.astype(np.float32)
    # In float64, because the difference of two float32 numbers may be infinite. All
    # values are 0 if they are equal.
    scaled = (numbers.astype(np.float64) - low) / ((high - low) or 1.0)
    return scaled.astype(np.float32)


def _orientation(image: Any) -> Any:
    """Return the orientation of EXIF, which is one of 1..8, or None."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # the metadata is damaged, the pixels are not
        return None


def _upright(picture: NDArray[Any], orientation: Any) -> NDArray[Any]:
    """Turn and flip a picture as EXIF defines it; upright pictures have 1 or None."""
    if orientation in (5, 6, 7, 8):
        picture = picture.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def patch_side(height: int, width: int) -> int:
    """Return the side of a patch in pixels: as small as the largest N allows."""
    side = max(_MIN_PATCH, int(np.ceil(np.sqrt(height * width / _MAX_TOKENS))))
    short = min(height, width)
    # A single row of patches is as tall as the picture: otherwise, up to half of the
    # picture would be cut off.
    return side if 2 * side <= short else short


def cut_into_patches(picture: NDArray[Any], patch: int) -> tuple[NDArray[Any], int]:
    """Return the patches (N, patch·patch·3) in raster order, and how many rows of them.

    `patch` is the side of a patch in pixels.
    """
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    whole = picture[: rows * patch, : columns * patch]  # without the partial patches
    # (rows, columns, patch, patch, 3)
    patches = whole.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    return patches.reshape(rows * columns, -1), rows


def join_patches(pixels: NDArray[Any], rows: int, patch: int) -> NDArray[Any]:
    """Return the picture that `cut_into_patches` cut into these patches."""
    patches = pixels.reshape(rows, -1, patch, patch, 3).swapaxes(1, 2)
    return patches.reshape(rows * patch, -1, 3)
