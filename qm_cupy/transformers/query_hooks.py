"""Hooks on the attention modules of a model, which bring a cache its queries.

`cache.update` gets keys and values, but not the queries that the attention mass needs.
A hook computes the queries of a forward pass again, from the input of the attention
module. It also computes the last keys again and compares them with those in the cache,
so that a model whose attention works in another way is refused, and not merged wrongly.
"""

import inspect
import sys
import weakref
from typing import Any

import torch

from ..caches.cache_checks import Rotary
from ..caches.rotary import rotate
from .merged_layer import MergedLayer

_CHECKED = 8  # keys that are compared, in the first forward pass of a layer
_TOLERANCE = 0.03  # of their relative difference; bfloat16 keys differ by 0.01


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
        if not getattr(module, "is_causal", True) or not hasattr(module, "scaling"):
            raise ValueError(
                f"{type(module).__name__} is not causal, or has no `scaling` of its "
                "scores: use transformers' DynamicCache"
            )
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

    decoder = model.base_model

    def before_model(module: Any, args: Any, kwargs: Any) -> None:
        owner, inputs = reference(), _arguments(module, args, kwargs)
        if owner is None or _name_of(owner, inputs) is None:
            return
        check_padding(inputs.get("attention_mask"))
        if module is decoder:
            owner.before_model(inputs)

    def after_model(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        owner, inputs = reference(), _arguments(module, args, kwargs)
        if owner is None:
            return
        name = _name_of(owner, inputs)
        if name is not None:
            owner.after_model(module, name)

    handles = [
        module.register_forward_hook(after_attention, with_kwargs=True)
        for module in attention_modules(model)
    ]
    # A model with a head, and the decoder inside, which may be called by itself.
    for module in {model, decoder}:
        handles.append(module.register_forward_pre_hook(before_model, with_kwargs=True))
    handles.append(decoder.register_forward_hook(after_model, with_kwargs=True))
    return handles


def _arguments(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _name_of(cache: Any, inputs: dict[str, Any]) -> str | None:
    """Return by which name a call has the cache, or None if it does not."""
    for name in ("cache", "past_key_values"):
        if inputs.get(name) is cache:
            return name
    return None


def check_padding(mask: Any) -> None:
    """Raise if an attention mask has padding, or is not a mask of padding."""
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise ValueError(
            "`MergedCache` needs causal attention: `attention_mask` must be None or of "
            "shape (B, n), without padding"
        )
    # While a model decodes, the mask only grows by ones, so long masks of one new token
    # are read too; their values are on the CPU or were read for the prompt.
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all()):
        raise ValueError(
            "`MergedCache` does not support padded batches: `attention_mask` has "
            "zeros. Generate for prompts of one length at a time"
        )


def check_positions(positions: Any, seen: int) -> None:
    """Raise unless the positions of new tokens continue those of the tokens seen."""
    if not isinstance(positions, torch.Tensor):
        return
    count = positions.shape[-1]
    wanted = torch.arange(seen, seen + count, device=positions.device)
    if not bool((positions == wanted).all()):
        raise ValueError(
            f"`MergedCache` needs positions {seen}..{seen + count - 1} for new tokens: "
            "leave out `position_ids`, and generate for prompts of one length at a "
            "time, without padding"
        )


def _file_of(module: Any) -> Any:
    """Return the Python module that defines the class of an attention module."""
    return sys.modules[type(module).__module__]


def _query(
    module: Any, hidden: torch.Tensor, embeddings: Any, layer: MergedLayer
) -> torch.Tensor:
    """Return the rotated queries (B, H_q, T, d) of hidden states (B, T, D)."""
    if not layer.checked:
        _check_keys(module, hidden, embeddings, layer)
    query = _heads(module, "q", hidden)
    rotated: torch.Tensor = _file_of(module).apply_rotary_pos_emb(
        query, query, *embeddings
    )[0]
    return rotated


def _check_keys(
    module: Any, hidden: torch.Tensor, embeddings: Any, layer: MergedLayer
) -> None:
    """Compute the last keys again, and raise unless they are those of the cache."""
    last = slice(-min(_CHECKED, hidden.shape[1]), None)
    parts = (x[..., last, :] for x in embeddings)
    try:
        straight = _heads(module, "k", hidden[:, last])
        key = _file_of(module).apply_rotary_pos_emb(straight, straight, *parts)[1]
    except (AttributeError, RuntimeError) as error:
        raise _other_keys(module) from error  # shapes that do not fit
    stored = layer.keys[..., -key.shape[-2] :, :]
    if _difference(key, stored) > _TOLERANCE:
        raise _other_keys(module)
    if layer.rotary is not None:
        positions = layer.positions[..., -key.shape[-2] :]
        layer.rotary = _check_rotation(
            module, straight, stored, positions, layer.rotary
        )
    layer.checked = layer.seen > 1  # position 0 does not rotate


def _check_rotation(
    module: Any, straight: Any, stored: Any, positions: Any, rotary: Rotary
) -> Rotary:
    """Return the rotation with the right pairs of elements, or raise."""
    x = straight.float().cpu().numpy()
    for interleaved in (False, True):
        tried = rotary._replace(interleaved=interleaved)
        y = torch.from_numpy(rotate(x, positions.cpu().numpy(), *tried))
        if _difference(y, stored.cpu()) <= _TOLERANCE:
            return tried
    raise ValueError(
        f"{type(module).__name__} does not rotate its keys as its configuration says: "
        "pass `model.config`, to merge by keys alone"
    )


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the norm of the difference, relative to that of y."""
    x, y = x.float(), y.float()
    if x.shape != y.shape:
        return float("inf")
    least = torch.finfo(torch.float32).tiny
    return float((x - y).norm() / y.norm().clamp(min=least))


def _other_keys(module: Any) -> ValueError:
    return ValueError(
        f"the keys of {type(module).__name__} are not those of `k_proj`, `k_norm` and "
        "`apply_rotary_pos_emb`, so its queries cannot be computed: pass "
        "`model.config`, to merge by keys alone"
    )


def _heads(module: Any, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Return queries ("q") or keys ("k") before the rotation (B, H, T, d)."""
    projected = getattr(module, f"{name}_proj")(hidden)
    heads = projected.view(*hidden.shape[:2], -1, module.head_dim).transpose(1, 2)
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)
