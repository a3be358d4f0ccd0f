"""Small random language models, built from their configurations."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Four query heads and two key heads, except where a family needs other options.
_OPTIONS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # a text never ends early
}
_OWN = {
    "Qwen3": {"head_dim": 16},  # wider than 32 / 4
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 8},
    "Gemma3": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
    "Glm": {"head_dim": 8},
    "Helium": {"head_dim": 8},
    "Granite": {"attention_multiplier": 0.5},  # a scale other than 1/√d
}
# Families that the cache supports. The last three rotate pairs (2i, 2i + 1).
FAMILIES = (
    "Llama",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma3",
    "Granite",
    "Cohere",
    "Glm",
    "Helium",
)


def model_of(family="Llama", dtype=torch.float32, **options):
    """Return a random model of a family, the same in every call."""
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(
        **{**_OPTIONS, **_OWN.get(family, {}), **options}
    )
    config._attn_implementation = options.get("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    # Larger weights than those of an untrained model, so that attention is not uniform.
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                x.mul_(8)
    return model


def prompt_of(length, batch=1, seed=0):
    """Return random tokens (B, n)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (batch, length), generator=generator)


def num_hooks(model):
    """Return the number of hooks of all modules of a model."""
    return sum(
        len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules()
    )
