"""The configuration of a Llama model of Hugging Face transformers."""

from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """The arguments of `LanguageModel` besides its weights."""

    num_heads: int
    num_key_heads: int
    rope_base: float
    epsilon: float


def read_config(model: Any) -> Arguments:
    """Return the settings of a model; raise if they change what the network computes.

    Only attributes of the configuration are read, so transformers is not imported.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "state_dict"):
        raise TypeError(
            "`model` must be a model of transformers, such as LlamaForCausalLM, got "
            f"{type(model).__name__}"
        )
    name = getattr(config, "model_type", None)
    if name != "llama":
        raise ValueError(
            f'`model` must have the model_type "llama", got {str(name)[:60]!r}: other '
            "networks are not supported"
        )
    refused = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
    }
    for option, allowed in refused.items():
        value = getattr(config, option, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"`model` must have {option}={allowed[0]!r} in its configuration, got "
                f"{value!r}, which is not supported"
            )
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return Arguments(heads, key_heads, _rope_base(config), config.rms_norm_eps)


def _rope_base(config: Any) -> float:
    """Return the base of the rotation, or raise if the rotation is scaled."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # transformers before 5
        parameters = dict(getattr(config, "rope_scaling", None) or {})
        parameters.setdefault("rope_theta", getattr(config, "rope_theta", 10_000.0))
    name = parameters.get("rope_type", parameters.get("type", "default"))
    if name != "default":
        raise ValueError(
            f'`model` must have the rope_type "default", got {name!r}: scaled '
            "rotations are not supported"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            "`model` must rotate whole heads, got partial_rotary_factor="
            f"{parameters['partial_rotary_factor']!r}, which is not supported"
        )
    return float(parameters["rope_theta"])
