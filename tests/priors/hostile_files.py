"""Writes files of weights that `save` would not write, with a right digest."""

import hashlib
import json

from safetensors.numpy import save

BLANK = "0" * 64


def described(prior_type, settings, sha256=BLANK):
    """Return the description of a file as JSON; `settings` may be JSON already."""
    text = settings if isinstance(settings, str) else json.dumps(settings)
    name = json.dumps(prior_type)
    return f'{{"kind": {name}, "settings": {text}, "sha256": "{sha256}"}}'


def write(path, arrays, description):
    """Write arrays with a description, whose digest becomes right."""
    raw = save(arrays, metadata={"qm_cupy": description})
    digest = hashlib.sha256(raw).hexdigest()
    path.write_bytes(raw.replace(BLANK.encode(), digest.encode(), 1))


def write_header(path, header, data=b""):
    """Write a safetensors file with any bytes as its header."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
