"""Files of weights: safetensors that say what they are, checked to the byte."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write

_KEY = "qm_cupy"  # of the one entry of metadata: what kind of weights, and a digest
_BLANK = "0" * 64  # what stands in for the digest while it is computed
_KINDS = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}

Declare = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]


def save_weights(
    path: Path,
    kind: str,
    settings: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> None:
    """Write a safetensors file, at once; its digest is over every byte of it."""
    _safetensors(path)
    from safetensors.numpy import save

    about = json.dumps({"kind": kind, "settings": dict(settings), "sha256": _BLANK})
    # Strides would be lost without a word.
    plain = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    blank = save(plain, metadata={_KEY: about})
    digest = hashlib.sha256(blank).hexdigest()
    with atomic_write(path) as file:
        file.write(blank.replace(_BLANK.encode(), digest.encode(), 1))


def load_weights(
    path: Path, kind: str, declare: Declare
) -> tuple[Mapping[str, Any], dict[str, NDArray[Any]]]:
    """Return settings and arrays of a file, whose shapes `declare` knows beforehand.

    Nothing of the size of an array is read before all shapes are what they should be.
    """
    safe_open, error_type = _safetensors(path)
    with path.open("rb"):  # missing, a folder, not readable: the system says which
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            about = _about(path, file.metadata())
            if about["kind"] != kind:
                raise ValueError(f"{path} holds a {about['kind']}, not a {kind}")
            settings = about["settings"]
            wanted = _declared(path, declare, settings)
            _check_shapes(path, file, wanted)
            _check_digest(path, about["sha256"])
            arrays = {name: file.get_tensor(name) for name in wanted}
    except error_type as error:
        raise ValueError(f"{path} is damaged or no .safetensors file: {error}") from (
            error
        )
    return settings, arrays


def _safetensors(path: Path) -> tuple[Any, type[Exception]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        command = 'pip install "qm-cupy[safetensors]"'
        raise ImportError(f"{path} needs the safetensors package: {command}") from error
    return safe_open, SafetensorError


def _about(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        about = json.loads((metadata or {})[_KEY])
        if (
            not isinstance(about["settings"], dict)
            or not isinstance(about["kind"], str)
            or not isinstance(about["sha256"], str)
            or len(about["sha256"]) != len(_BLANK)
        ):
            raise ValueError(f"its `{_KEY}` is of another form")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not saved by a prior of qm_cupy") from error
    result: dict[str, Any] = about
    return result


def _declared(
    path: Path, declare: Declare, settings: Mapping[str, Any]
) -> Mapping[str, tuple[int, ...]]:
    try:
        return declare(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_shapes(path: Path, file: Any, wanted: Mapping[str, tuple[int, ...]]) -> None:
    if set(file.keys()) != set(wanted):
        raise ValueError(
            f"{path} must hold {sorted(wanted)}, it holds {sorted(file.keys())}"
        )
    for name, shape in wanted.items():
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{path}: `{name}` must have shape {shape}, "
                f"got {tuple(stored.get_shape())}"
            )
        if stored.get_dtype() not in _KINDS:
            raise ValueError(
                f"{path}: `{name}` must be one of {', '.join(_KINDS.values())}, "
                f"got {stored.get_dtype()}"
            )


def _check_digest(path: Path, digest: str) -> None:
    raw = path.read_bytes()
    blank = raw.replace(digest.encode(), _BLANK.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its bytes do not have its digest")
