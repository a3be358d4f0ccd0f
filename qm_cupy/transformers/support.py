"""Which models and configurations a merged cache supports, and their rotation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..caches.cache_checks import Rotary

# The attention functions of transformers that add a bias for each key.
SUPPORTED = "sdpa", "flex_attention"


def check_config(config: Any) -> Any:
    """Return the configuration of the decoder, or raise if it is not supported."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "`MergedCache` does not support encoder-decoder models, got "
            f"{type(config).__name__}"
        )
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    if types is None:
        sliding = getattr(text, "sliding_window", None)
        uses = getattr(text, "use_sliding_window", True)
        types = [
            "sliding_attention" if sliding is not None and uses else "full_attention"
        ]
    others = sorted(set(types) - {"full_attention"})
    if others:
        raise ValueError(
            "`MergedCache` supports layers of full attention only, but "
            f"{type(text).__name__} has {', '.join(others)}: use transformers' "
            "DynamicCache"
        )
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            "`MergedCache` does not support attention with soft-capped scores, which "
            f"{type(text).__name__} has"
        )
    if not all(getattr(text, "no_rope_layers", None) or [True]):
        raise ValueError(
            "`MergedCache` does not support models some of whose layers do not rotate "
            f"their keys (`no_rope_layers`), such as {type(text).__name__}"
        )
    return text


def check_attention(config: Any) -> None:
    """Raise unless the model's attention adds a bias for each key."""
    name = getattr(config, "_attn_implementation", None)
    if name in SUPPORTED:
        return
    reasons = {
        "eager": "ignores the bias of merged entries without an error",
        "paged|eager": "ignores the bias of merged entries without an error",
    }
    reason = reasons.get(str(name), "takes no bias for each key")
    raise ValueError(
        f'`MergedCache` needs attn_implementation="sdpa" or "flex_attention", but '
        f'{name!r} {reason}: call `model.set_attn_implementation("sdpa")`'
    )


def rotary_of(config: Any, model: Any = None) -> Rotary | None:
    """Return how a model rotates its keys, or None if it does not.

    A rotation whose frequencies depend on the length of the text is refused. The
    result has pairs (i, i + r/2); a hook finds out about pairs (2i, 2i + 1).
    """
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return None
    # Gemma 3 has a rotation for each type of layers.
    parameters = parameters.get("full_attention", parameters)
    name = parameters.get("rope_type", "default")
    if name in ("dynamic", "longrope"):
        raise ValueError(
            f'`MergedCache` does not support rope_type="{name}", whose frequencies '
            "depend on the length of the text"
        )
    module = None if model is None else _frequencies_of(model)
    if module is not None:
        inv_freq, scaling = module
    elif name == "default":
        inv_freq, scaling = _default_frequencies(config, parameters), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[name](config)
    if hasattr(inv_freq, "detach"):
        inv_freq = inv_freq.detach().cpu().double().numpy()
    return Rotary(np.asarray(inv_freq, np.float64), False, float(scaling))


def _default_frequencies(config: Any, parameters: Any) -> NDArray[np.float64]:
    """Return base^(-2i / r) for the r rotated elements of a head."""
    dim = getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    rotated = int(dim * parameters.get("partial_rotary_factor", 1.0))
    # As transformers computes them, in float32.
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    base = np.float32(parameters["rope_theta"])
    frequencies: NDArray[np.float64] = (1 / base**exponent).astype(np.float64)
    return frequencies


def _frequencies_of(model: Any) -> tuple[Any, Any] | None:
    """Return the frequencies and the scaling factor that a model uses, or None."""
    for module in model.modules():
        for prefix in ("", "full_attention_"):
            names = f"{prefix}inv_freq", f"{prefix}attention_scaling"
            if all(hasattr(module, name) for name in names):
                return getattr(module, names[0]), getattr(module, names[1])
    return None
