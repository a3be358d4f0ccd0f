"""Random Llama models: of transformers, and as state dicts and GGUF files."""

import numpy as np
import pytest

import qm_cupy as qm

VOCABULARY = 101


def ids_of(*shape, seed=0):
    """Return random ids without 0, which transformers takes for padding."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


def in_transformers(tied=True, **options):
    """Return a LlamaForCausalLM with four heads of queries and two of keys."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": tied,
            # Large weights and ε, so that an error in either changes the logits.
            "initializer_range": 0.3,
            "rms_norm_eps": 1e-2,
            # No token ends a text, so that `generate` returns all that were asked for.
            "bos_token_id": None,
            "eos_token_id": None,
            **options,
        }
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # otherwise they are all 1
                weight.copy_(torch.rand_like(weight) + 0.5)
    return model


def random_model(**options):
    """Return a small model of this library; no other package is needed."""
    sizes = {"num_heads": 4, "num_key_heads": 2, "num_layers": 3, "mlp_dim": 48}
    return qm.LanguageModel.init(VOCABULARY, 32, **{**sizes, **options})


def write_gguf(path, model, *, change=lambda writer: None, skip=(), architecture=None):
    """Write the weights of a model to a GGUF file, as llama.cpp's converter does.

    `change` may add fields or tensors to the writer, and `skip` has names to leave out.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture or "llama")
    weights = {name: np.asarray(x, np.float32) for name, x in model.weights.items()}
    # The settings are fields of the header.
    layers = sum(name.endswith("q_proj.weight") for name in weights)
    dim = weights["norm.weight"].size
    mlp_dim = len(weights["layers.0.mlp.gate_proj.weight"])
    writer.add_block_count(layers)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(mlp_dim)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_key_heads)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.epsilon)
    # Names in files of llama.cpp.
    inner = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    outer = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    # The converter of llama.cpp changes only the queries and keys.
    for name, x in weights.items():
        base = name.removesuffix(".weight")
        if base in outer:
            new = outer[base]
        else:
            _, layer, part = base.split(".", 2)
            new = f"blk.{layer}.{inner[part]}"
        heads = {"q": model.num_heads, "k": model.num_key_heads}.get(
            base.split(".")[-1].removesuffix("_proj")
        )
        if heads:  # rows i and i + d / 2 of a head become neighbours
            x = x.reshape(heads, 2, -1, dim).swapaxes(1, 2).reshape(x.shape)
        if f"{new}.weight" not in skip:
            writer.add_tensor(f"{new}.weight", np.ascontiguousarray(x))
    # A change may be a tensor, which must come before the file is written.
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
