"""Models in GGUF files: what is read, and files that are refused."""

import importlib.util
import sys

import numpy as np
import pytest
from llama_models import ids_of, in_transformers, random_model, write_gguf

import qm_cupy as qm

gguf = pytest.importorskip("gguf")


@pytest.fixture
def model():
    return random_model(tied=False)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_has_the_model(tied, tmp_path):
    """The rows of queries and keys are in another order in the file."""
    # Weights of transformers, whose logits are tested elsewhere.
    theirs, ids = in_transformers(tied), ids_of(2, 20)
    model = qm.LanguageModel.from_transformers(theirs)
    read = qm.LanguageModel.from_gguf(write_gguf(tmp_path / "model.gguf", model))
    assert set(read.weights) == set(model.weights)
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(read.weights[name], weight)
    # GGUF stores ε in float32.
    assert read.epsilon == pytest.approx(model.epsilon)
    wanted = model.predict(model.embed(ids))
    np.testing.assert_allclose(read.predict(read.embed(ids)), wanted, atol=1e-4)


def test_transformers_reads_the_same_file(tmp_path):
    """The order of the rows is that of llama.cpp, which transformers undoes too."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("transformers reads GGUF files only with accelerate")
    model = random_model()

    def vocabulary(writer):
        # transformers reads the size of the vocabulary from the list of its tokens.
        writer.add_vocab_size(101)
        writer.add_context_length(64)

    path = write_gguf(tmp_path / "model.gguf", model, change=vocabulary)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype="float32",
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    ids = ids_of(1, 12)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    read = qm.LanguageModel.from_gguf(path)
    np.testing.assert_allclose(read.predict(read.embed(ids)), wanted, atol=1e-4)


def test_quantized_weights(tmp_path):
    """A file may have types of less than 4 bytes for each weight."""
    # Q8_0 stores blocks of 32 weights with one scale.
    model = random_model(mlp_dim=64)
    path = tmp_path / "model.gguf"
    rows = np.asarray(model.weights["layers.0.mlp.down_proj.weight"])  # 64 columns

    def quantized(writer):
        data = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
        name = "blk.0.ffn_down.weight"
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    write_gguf(path, model, change=quantized, skip=["blk.0.ffn_down.weight"])
    got = qm.LanguageModel.from_gguf(path).weights["layers.0.mlp.down_proj.weight"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, rows, atol=np.abs(rows).max() / 127)
    assert (got != rows).any()  # it was quantized


# What makes a Llama file another network, and a part of the message.
CHANGES = {
    "linear scaling": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        "scaled rotation",
    ),
    "scaling factor": (lambda w: w.add_rope_scaling_factor(4.0), "scaled rotation"),
    "frequencies": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
        "rope_freqs.weight",
    ),
    "experts": (lambda w: w.add_expert_count(8), "expert_count = 8"),
    "window": (lambda w: w.add_sliding_window(64), "sliding_window = 64"),
    "biases": (
        lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)),
        "unknown are",
    ),
    "partial rotation": (lambda w: w.add_rope_dimension_count(4), "rotates 4 of the 8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_networks_that_differ_are_refused(name, model, tmp_path):
    change, message = CHANGES[name]
    path = write_gguf(tmp_path / "model.gguf", model, change=change)
    with pytest.raises(ValueError, match=message) as error:
        qm.LanguageModel.from_gguf(path)
    # Without the path, which may have any length.
    assert len(str(error.value).replace(str(path), "")) < 300


# A weight of a layer, and both that exist once.
@pytest.mark.parametrize("name", ["blk.1.attn_v", "token_embd", "output_norm"])
def test_missing_weights(name, model, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model, skip=[f"{name}.weight"])
    with pytest.raises(ValueError, match=rf"missing are \['{name}.weight'\]"):
        qm.LanguageModel.from_gguf(path)


def test_other_architectures(model, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model, architecture="gemma3")
    with pytest.raises(ValueError, match="architecture \"llama\", got 'gemma3'"):
        qm.LanguageModel.from_gguf(path)


def test_wrong_numbers_of_heads(model, tmp_path):
    # No model has 0 heads, so change a frozen one.
    wrong = random_model(tied=False)
    object.__setattr__(wrong, "num_heads", 0)
    written = write_gguf(tmp_path / "model.gguf", wrong)
    with pytest.raises(ValueError, match="must have 0 heads of an even width"):
        qm.LanguageModel.from_gguf(written)


def test_nan_weights(model, tmp_path):
    # The check of the model itself has passed already.
    model.weights["layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight` must be fin"):
        qm.LanguageModel.from_gguf(path)


# At every length, the header or the weights end too early.
@pytest.mark.parametrize("part", [0.0001, 0.001, 0.01, 0.03, 0.5, 0.99])
def test_truncated_files(part, model, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", model)
    content = path.read_bytes()
    path.write_bytes(content[: max(4, int(len(content) * part))])
    with pytest.raises(ValueError, match="is damaged") as error:
        qm.LanguageModel.from_gguf(path)
    # Errors of NumPy may have several lines.
    assert "\n" not in str(error.value)


# Empty, too short, a zip archive, and JSON.
@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 archive", b"{}"])
def test_files_of_another_format(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a GGUF file: it must begin with GGUF"):
        qm.LanguageModel.from_gguf(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        qm.LanguageModel.from_gguf(tmp_path / "nothing.gguf")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match='needs the gguf package: pip install "gguf>'):
        qm.LanguageModel.from_gguf(tmp_path / "model.gguf")


def test_random_bytes_after_the_magic(tmp_path):
    """A hostile header ends in one error, whatever it says."""
    rng, path = np.random.default_rng(0), tmp_path / "model.gguf"
    for seed in range(20):
        # Half of them have a valid version and a small number of fields.
        body = rng.bytes(200) if seed % 2 else b"\x03\0\0\0" + rng.bytes(3) + b"\0" * 90
        path.write_bytes(b"GGUF" + body)
        with pytest.raises(ValueError, match=r"is damaged|must have the architecture"):
            qm.LanguageModel.from_gguf(path)
