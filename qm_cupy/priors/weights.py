"""Files of weights: safetensors with a description of the prior and a digest.

A prior is a model that predicts a merged token from the tokens before it. A safetensors
file is 8 bytes with the size of the header, the header (JSON: names, dtypes, shapes and
metadata), and the data of all arrays. The only entry of the metadata is the
description: a JSON text with the type of prior, its settings, and the SHA-256 digest of
the file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_finite_values
from ..atomic_write import atomic_write
from ..cuda.device import to_host
from ..install_advice import import_safetensors
from .configuration import shortened
from .weight_checks import converted_weights, listed

_KEY = "qm_cupy"  # key of the only entry of the metadata
_BLANK = "0" * 64  # placeholder for the digest (64 hex digits) while it is computed
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}

# A function that returns, for the settings of a file, the shapes of its arrays by name.
Declare = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]


def save_weights(
    path: Path,
    prior_type: str,
    settings: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> None:
    """Write a safetensors file atomically, with a digest of all its bytes."""
    save = import_safetensors(path).numpy.save
    description = json.dumps(
        {"kind": prior_type, "settings": dict(settings), "sha256": _BLANK}
    )
    # Weights may be of any library, and on a GPU.
    try:
        converted = map(to_host, converted_weights(arrays))
        # safetensors writes the memory of an array and ignores its strides, without an
        # error. So arrays must be C-contiguous.
        contiguous = {
            name: np.ascontiguousarray(x)
            for name, x in zip(arrays, converted, strict=True)
        }
        _check_finite(contiguous)
    except ValueError as error:
        raise ValueError(f"{path} was not written: {error}") from None
    # The file contains its own digest. The digest is computed with a placeholder of the
    # same length, and then replaces the placeholder.
    without_digest = save(contiguous, metadata={_KEY: description})
    digest = hashlib.sha256(without_digest).hexdigest()
    with atomic_write(path) as file:
        file.write(without_digest.replace(_BLANK.encode(), digest.encode(), 1))


def load_weights(
    path: Path, prior_type: str, declare: Declare
) -> tuple[Mapping[str, Any], dict[str, NDArray[Any]]]:
    """Return the settings and arrays of a file, after checks from cheap to expensive.

    `declare` computes all shapes from the settings. The shapes in the header are
    compared with the computed shapes before any array is read. So a damaged header
    cannot request the memory of a huge array.
    """
    module = import_safetensors(path)
    # Open the file once without safetensors: for a missing file, a folder, or a file
    # without permission to read, Python raises the usual OSError.
    with path.open("rb"):
        pass
    try:
        with module.safe_open(path, framework="numpy") as file:
            description = _read_description(path, file.metadata())
            if description["kind"] != prior_type:
                raise ValueError(
                    f"{path} must hold weights of {prior_type}, "
                    f"got {shortened(description['kind'])}"
                )
            settings = description["settings"]
            wanted = _declared(path, declare, settings)
            _check_shapes(path, file, wanted)
            _check_digest(path, description["sha256"])
            arrays = {name: file.get_tensor(name) for name in wanted}
    except module.SafetensorError as error:
        # The message may quote a part of the header, of any length.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is damaged or is not a .safetensors file: {reason}"
        ) from error
    try:
        _check_finite(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return settings, arrays


def _check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise if an array has a NaN or Inf; the message names the array and the index."""
    for name, array in arrays.items():
        check_finite_values(name, array)


def _read_description(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the description of a file; raise if the metadata has none."""
    try:
        description = json.loads((metadata or {})[_KEY])
        if (
            not isinstance(description["settings"], dict)
            or not isinstance(description["kind"], str)
            or not isinstance(description["sha256"], str)
            or not re.fullmatch(r"[0-9a-f]{64}", description["sha256"])
        ):
            raise ValueError(f"the metadata entry `{_KEY}` has an unknown form")
    # JSON of a hostile file may be nested too deeply (RecursionError), or contain an
    # integer with more digits than Python converts (ValueError).
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not saved by a prior of qm_cupy") from error
    result: dict[str, Any] = description
    return result


def _declared(
    path: Path, declare: Declare, settings: Mapping[str, Any]
) -> Mapping[str, tuple[int, ...]]:
    """Return the declared shapes; an error about the settings names the file."""
    try:
        return declare(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_shapes(path: Path, file: Any, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if the names, shapes or dtypes of the arrays are not those of `wanted`."""
    names = set(file.keys())
    if names != set(wanted):
        raise ValueError(
            f"{path} must hold the weights of its settings: "
            f"missing are {listed(set(wanted) - names)}, "
            f"unknown are {listed(names - set(wanted))}"
        )
    for name, shape in wanted.items():
        stored = file.get_slice(name)  # reads the header only
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{path}: `{name}` must have shape {shape}, "
                f"got {shortened(tuple(stored.get_shape()))}"
            )
        if stored.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{path}: `{name}` must be one of {', '.join(_DTYPES.values())}, "
                f"got {stored.get_dtype()}"
            )


def _check_digest(path: Path, digest: str) -> None:
    """Raise if the digest of the file is not `digest`, because a byte has changed.

    The digest is not a signature: anyone can compute it.
    """
    content = path.read_bytes()
    # The header comes first, so the first occurrence is the digest in the metadata.
    without_digest = content.replace(digest.encode(), _BLANK.encode(), 1)
    if hashlib.sha256(without_digest).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its bytes do not match its digest")
