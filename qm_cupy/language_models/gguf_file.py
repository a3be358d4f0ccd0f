"""Llama models in GGUF files, the format of llama.cpp, with quantized weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..install_advice import install_command
from ..priors.configuration import shortened
from ..priors.weight_checks import listed
from .llama_config import Arguments
from .llama_weights import EMBEDDING, HEAD, NORM, untied

_MAGIC = b"GGUF"
_OUTER = {"token_embd": EMBEDDING, "output_norm": NORM, "output": HEAD}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MAX_LAYERS = 1024  # a damaged file may say any number


def read_gguf(path: Path) -> tuple[dict[str, NDArray[Any]], Arguments]:
    """Return the weights of a file in float32 by their names, and the settings."""
    try:
        import gguf
    except ImportError as error:
        command = install_command("gguf")
        raise ImportError(f"{path} needs the gguf package: {command}") from error
    with path.open("rb") as file:  # the usual OSError for a missing file
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it must begin with GGUF")
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: _contents(field) for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except OSError:
        raise
    # The package checks little: a damaged file ends in an error of NumPy or Python.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{path} is damaged: {reason}") from error
    arguments, num_layers = _arguments(path, fields)
    names = _names(path, tensors, num_layers)
    heads = {"attn_q": arguments.num_heads, "attn_k": arguments.num_key_heads}
    weights = {}
    for name, new_name in names.items():
        weight = _dequantized(path, gguf, tensors[name])
        part = name.split(".")[-2]
        if part in heads:
            weight = _half_split(path, name, weight, heads[part])
        weights[new_name] = weight
    _check_head_dim(path, fields, weights, arguments)
    return untied(weights), arguments


def _contents(field: Any) -> Any:
    """Return the value of a field; lists, such as the vocabulary, are not read."""
    if len(field.types) > 1:
        return None
    return field.contents()


def _arguments(path: Path, fields: Mapping[str, Any]) -> tuple[Arguments, int]:
    """Return the settings and the number of layers; raise for other networks."""
    name = fields.get("general.architecture")
    if name != "llama":
        raise ValueError(
            f'{path} must have the architecture "llama", got {shortened(name)}: other '
            "networks are not supported"
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(
        fields.get(f"llama.rope.{x}", 1.0) != 1.0
        for x in ("scaling.factor", "scale_linear")
    ):
        raise ValueError(
            f"{path} has a scaled rotation (llama.rope.scaling.type = "
            f"{shortened(scaling)}), which is not supported"
        )
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if fields.get(key):
            raise ValueError(f"{path} has {key} = {fields[key]}: it is not supported")
    heads = _number(path, fields, "llama.attention.head_count")
    arguments = Arguments(
        heads,
        _number(path, fields, "llama.attention.head_count_kv", heads),
        _number(path, fields, "llama.rope.freq_base", 10_000.0),
        _number(path, fields, "llama.attention.layer_norm_rms_epsilon"),
    )
    num_layers = _number(path, fields, "llama.block_count")
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise ValueError(
            f"{path}: llama.block_count must lie in 1..{_MAX_LAYERS}, got {num_layers}"
        )
    return arguments, num_layers


def _number(
    path: Path, fields: Mapping[str, Any], key: str, default: Any = None
) -> Any:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {key} must be a number, got {shortened(value)}")
    return value


def _names(path: Path, tensors: Mapping[str, Any], num_layers: int) -> dict[str, str]:
    """Return the name of each weight by its name in the file; raise for others."""
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path} has a scaled rotation (rope_freqs.weight), which is not supported"
        )
    names = {f"{old}.weight": new for old, new in _OUTER.items()}
    for i in range(num_layers):
        for old, new in _INNER.items():
            names[f"blk.{i}.{old}.weight"] = f"layers.{i}.{new}.weight"
    if "output.weight" not in tensors:  # the embedding is the head too
        del names["output.weight"]
    absent, unknown = set(names) - set(tensors), set(tensors) - set(names)
    if absent or unknown:
        raise ValueError(
            f"{path} must hold the weights of {num_layers} layers: missing are "
            f"{listed(absent)}, unknown are {listed(unknown)}"
        )
    return names


def _dequantized(path: Path, gguf: Any, tensor: Any) -> NDArray[np.float32]:
    """Return a weight in float32, as a copy: the reader maps the file to memory."""
    try:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{path}: the gguf package cannot read `{shortened(tensor.name)}`, of type "
            f"{tensor.tensor_type.name}"
        ) from error
    copy: NDArray[np.float32] = np.array(weight, np.float32, order="C")
    return copy


def _half_split(
    path: Path, name: str, weight: NDArray[np.float32], heads: int
) -> NDArray[np.float32]:
    """Return the rows of queries or keys in the order of half-split pairs.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, and its files have the rows
    in this order. Here, rows i and i + d / 2 are a pair.
    """
    if weight.ndim != 2 or heads < 1 or weight.shape[0] % (2 * heads):
        raise ValueError(
            f"{path}: `{name}` must have {heads} heads of an even width, got shape "
            f"{weight.shape}"
        )
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _check_head_dim(
    path: Path,
    fields: Mapping[str, Any],
    weights: Mapping[str, NDArray[Any]],
    arguments: Arguments,
) -> None:
    """Raise if the file rotates only a part of each head."""
    rows = len(weights["layers.0.self_attn.q_proj.weight"])
    head_dim = rows // arguments.num_heads
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{path} rotates {rotated} of the {head_dim} elements of a head, which is "
            "not supported"
        )
