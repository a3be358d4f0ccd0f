"""Hooks on the attention modules of a model, which bring a cache its queries.

`cache.update` gets keys and values, but not the queries that the attention mass needs.
A hook computes the queries of a forward pass again, from the input of the attention
module. It also computes the last keys again and compares them with those in the cache,
so that a model whose attention works in another way is refused, and not merged wrongly.
"""

import sys
import weakref
from typing import Any

import torch

from .merged_layer import MergedLayer

_CHECKED = 8  # keys that are compared, in the first forward pass of a layer


def attention_modules(model: Any) -> list[Any]:
    """Return the attention modules of a decoder, one for each layer, or raise.

    Their queries come from `q_proj`, a `q_norm` if there is one, and
    `apply_rotary_pos_emb`.
    """
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "q_proj") and hasattr(module, "layer_idx")
    ]
    if not modules:
        raise ValueError(
            f"the attention of {type(model).__name__} has no `q_proj`, from which the "
            "queries could be computed: pass `model.config`, to merge by keys alone"
        )
    for module in modules:
        if not hasattr(_file_of(module), "apply_rotary_pos_emb"):
            raise ValueError(
                f"{type(module).__name__} does not rotate queries by "
                "`apply_rotary_pos_emb`: pass `model.config`, to merge by keys alone"
            )
    return modules


def install(cache: Any, model: Any) -> list[Any]:
    """Add hooks that serve this cache only; return what removes them.

    The hooks do not keep the cache alive.
    """
    reference = weakref.ref(cache)

    def after_attention(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        owner = reference()
        used = kwargs.get("cache", kwargs.get("past_key_values"))
        if owner is None or used is not owner:
            return  # the model runs with another cache, or none
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        layer = owner.layers[module.layer_idx]
        num_new = hidden.shape[1]
        layer.scale = module.scaling
        query = None
        if layer.wants_queries(num_new):
            embeddings = kwargs.get("position_embeddings")
            if embeddings is None:
                embeddings = args[1]
            query = _query(module, hidden, embeddings, layer)
        layer.after_attention(query, num_new)

    def before_model(module: Any, args: Any, kwargs: Any) -> None:
        owner = reference()
        if owner is not None and owner in (
            kwargs.get("cache"),
            kwargs.get("past_key_values"),
        ):
            check_padding(kwargs.get("attention_mask"))

    handles = [
        module.register_forward_hook(after_attention, with_kwargs=True)
        for module in attention_modules(model)
    ]
    handles.append(model.register_forward_pre_hook(before_model, with_kwargs=True))
    return handles


def check_padding(mask: Any) -> None:
    """Raise if a two-dimensional attention mask has padding."""
    # While a model decodes, the mask only grows by ones, so long masks of one new token
    # are read too; their values are on the CPU or were read for the prompt.
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise ValueError(
            "`MergedCache` does not support padded batches: `attention_mask` has "
            "zeros. Generate for prompts of one length at a time"
        )


def _file_of(module: Any) -> Any:
    """Return the Python module that defines the class of an attention module."""
    return sys.modules[type(module).__module__]


def _query(
    module: Any, hidden: torch.Tensor, embeddings: Any, layer: MergedLayer
) -> torch.Tensor:
    """Return the rotated queries (B, H_q, T, d) of hidden states (B, T, D)."""
    rotate = _file_of(module).apply_rotary_pos_emb
    cosine, sine = embeddings
    query = _heads(module, "q", hidden)
    rotated: torch.Tensor = rotate(query, query, cosine, sine)[0]
    if not layer.checked:
        last = slice(-min(_CHECKED, hidden.shape[1]), None)
        parts = cosine[..., last, :], sine[..., last, :]
        key = _heads(module, "k", hidden[:, last])
        key = rotate(key, key, *parts)[1]
        stored = layer.keys[..., -key.shape[-2] :, :]
        tolerance = 1e-3 if key.dtype.itemsize > 2 else 0.1
        if not torch.allclose(key.float(), stored.float(), tolerance, tolerance):
            raise ValueError(
                f"the keys of {type(module).__name__} are not those of `k_proj` and "
                "`apply_rotary_pos_emb`, so its queries cannot be computed: pass "
                "`model.config`, to merge by keys alone"
            )
        layer.checked = True
    return rotated


def _heads(module: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return queries ("q") or keys ("k") before the rotation (B, H, T, d)."""
    projected = getattr(module, f"{name}_proj")(hidden)
    heads = projected.view(*hidden.shape[:2], -1, module.head_dim).transpose(1, 2)
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)
