"""Retrieval from shortened caches: batches, the ends of answers, and a second reading.

The model is random. It reads bytes.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from qm_cupy.transformers import MergedCache  # noqa: E402 (after the skip)

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = "cache_reading", "cache_rereading", "lm_retrieval", "ruler", "smollm2"
END = 0  # the token that ends a text


class Writer:
    """A model that writes a text for each row, whatever it reads."""

    def __init__(self, *texts):
        self.texts, self.step = [x.encode() for x in texts], 0

    def __call__(self, ids, **options):
        logits = torch.zeros(len(ids), 1, 256)
        for row, text in enumerate(self.texts):
            # After its text, a row has the token that ends it.
            token = text[self.step] if self.step < len(text) else END
            logits[row, 0, token] = 1
        self.step += 1
        return SimpleNamespace(logits=logits, cache=None)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        # transformers looks for a package of this name.
        patch.delitem(sys.modules, "kernels", raising=False)
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.smollm2.random_model()


@pytest.fixture(scope="module")
def tokenizer(scripts):
    return scripts.smollm2.ByteTokenizer()


@pytest.fixture(scope="module")
def prompt(scripts, model):
    # Byte 0 ends a text, so it is left out.
    ids = np.random.default_rng(1).integers(1, 256, 120).tolist()
    return scripts.cache_reading.read(model, ids, repeated=120)


def sample_of(scripts, *answers):
    return scripts.ruler.Sample("niah_single_1", "Text.", "\nWhat?", " It", [*answers])


@pytest.mark.parametrize("chat", [False, True])
def test_the_question_follows_the_context(scripts, chat, tokenizer):
    sample = sample_of(scripts, "7")
    # Both parts are tokens, so they are read as two texts of bytes.
    parts = scripts.lm_retrieval.split_tokens(tokenizer, sample, chat)
    texts = tuple(bytes(x).decode() for x in parts)
    if chat:  # the answer starts where the model's turn does
        assert texts == ("<user>Text.", "\nWhat?</user><model> It")
    else:
        assert texts == ("Text.", "\nWhat? It")


def test_ends_of_answers(scripts, tokenizer):
    ids = torch.ones(4, 1, dtype=torch.long)
    model = Writer("is 5 or 12, and", "is 5\nmore 12", "\nis 12", "no answer")
    sample = sample_of(scripts, "12")
    texts = scripts.lm_retrieval.continued(model, tokenizer, None, ids, sample)
    # An answer, the end of a line that is not empty, an empty line, and the end.
    assert texts == ["is 5 or 12", "is 5\n", "\nis 12", "no answer"]
    # Lines do not end a list of several answers.
    model, sample = Writer("5\n12\n13"), sample_of(scripts, "5", "12")
    texts = scripts.lm_retrieval.continued(model, tokenizer, None, ids[:1], sample)
    assert texts == ["5\n12"]


def test_an_answer_has_a_limit(scripts, tokenizer):
    ids, model = torch.ones(1, 1, dtype=torch.long), Writer("x" * 100)
    sample = sample_of(scripts, "12")
    texts = scripts.lm_retrieval.continued(model, tokenizer, None, ids, sample)
    # The text goes on, but no more of it is generated.
    assert texts == ["x" * 32]


def test_a_batch_of_caches_answers_like_each_of_them(scripts, model, prompt):
    reading, methods = scripts.cache_reading, scripts.cache_rereading.REREADING
    caches = [prompt.whole, *(shorten(prompt, 60) for shorten in methods.values())]
    ids = torch.tensor([[9, 8, 7]])
    layers = scripts.lm_retrieval.stacked(caches)
    with torch.no_grad():
        cache = reading.filled_cache(model, layers, prompt.num_tokens)
        batch = model(ids.expand(len(caches), -1), cache=cache).logits
        for cache, together in zip(caches, batch, strict=True):
            single = reading.filled_cache(model, cache, prompt.num_tokens)
            alone = model(ids, cache=single).logits[0]
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # The caches differ, so that rows that are mixed up would be seen.
    assert (batch[0] - batch[1]).abs().max() > 1e-3


def test_the_whole_cache_answers_like_one_reading(scripts, model, tokenizer):
    reading, retrieval = scripts.cache_reading, scripts.lm_retrieval
    (sample,) = scripts.ruler.samples("niah_single_1", tokenizer, 200, 1, 1)
    context, question = retrieval.split_tokens(tokenizer, sample, True)
    ids = torch.tensor([context + question])
    # Without a shortened cache, context and question are one text.
    expected = retrieval.continued(model, tokenizer, None, ids, sample)
    # With one, the question is read after the cache was filled.
    prompt = reading.read(model, context)
    cache = reading.filled_cache(model, prompt.whole, prompt.num_tokens)
    ids = torch.tensor([question])
    assert retrieval.continued(model, tokenizer, cache, ids, sample) == expected
    assert expected != [""]


def test_a_report(scripts, model, tmp_path, tokenizer):
    """Its samples are those of the split, and every method has a score for each."""
    methods = {"all": lambda prompt, count: prompt.whole}
    run, tasks = scripts.lm_retrieval.retrieval, [("niah_single_1", 200)]
    path = tmp_path / "report.json"
    arguments = model, tokenizer, tasks, methods
    first = run(*arguments, 1, "tuning", (0.5,), path)
    # The second run goes on from the file; the third needs no model.
    report = run(*arguments, 2, "tuning", (0.5,), path)
    assert json.loads(path.read_text(encoding="utf-8")) == report
    assert run(None, *arguments[1:], 2, "tuning", (0.5,), path) == report
    assert len(first["niah_single_1"]["200"]["full"]) == 1
    cell = report["niah_single_1"]["200"]
    # The seed of the tuning samples is 1.
    drawn = scripts.ruler.samples("niah_single_1", tokenizer, 200, 2, 1)
    assert cell["full"] == scripts.lm_retrieval.full_scores(model, tokenizer, drawn)
    assert cell["methods"] == {"all": {"0.5": cell["full"]}}


@pytest.mark.parametrize("name", ["KVzip", "merge_kv_cache, second reading"])
def test_the_budget_is_a_mean(scripts, prompt, name):
    layers = scripts.cache_rereading.REREADING[name](prompt, 60)
    present = [x.bias.isfinite().sum(-1).float() for x in layers]
    assert float(torch.stack(present).mean()) == pytest.approx(60, abs=0.5)
    # Heads have different budgets, as all of them compete.
    assert torch.stack(present).std() > 0


def test_kvzip_keeps_what_the_second_reading_looks_at(scripts, prompt):
    layers = scripts.cache_rereading.kvzip(prompt, 60)
    # The first head of the first layer, by its scores and the entries always kept.
    largest = scripts.cache_rereading.largest_attention(prompt)
    keys, kept = prompt.keys[0][0, 0], layers[0]
    count = int(kept.bias[0, 0].isfinite().sum())
    scores = largest[0, 0].clone()
    scores[:4] = scores[-8:] = torch.inf
    expected = scores.topk(count).indices.sort().values
    assert torch.equal(kept.keys[0, 0, :count], keys[expected])


@pytest.mark.parametrize("per_head", [False, True])
def test_the_second_reading_is_the_librarys(scripts, model, prompt, per_head):
    mine = scripts.cache_rereading.merged_again(prompt, 60, per_head=per_head)
    options = {"mass": "reread", "per_head": per_head}
    with MergedCache(model, 60, **options) as cache, torch.no_grad():
        model.model(prompt.ids, cache=cache)
    for ours, layer in zip(mine, cache.layers, strict=True):
        assert ours.keys.shape == layer.keys.shape
        torch.testing.assert_close(ours.keys, layer.keys)
        torch.testing.assert_close(ours.values, layer.values)
        torch.testing.assert_close(ours.bias, layer.bias)


def test_splits_have_different_samples(scripts):
    seeds = scripts.lm_retrieval.SEEDS
    # Otherwise the figures would be of samples that selected the settings.
    assert {*seeds} == {"tuning", "held_out"}
    assert seeds["tuning"] != seeds["held_out"]


def test_tables(scripts, capsys):
    # A mean of 0.75 counts, and one of 0.45 does not.
    cell = {"full": [1.0, 0.5], "methods": {"m": {"0.25": [0.0, 1.0]}}}
    low = {"full": [0.0, 0.9], "methods": {}}
    summary = scripts.lm_retrieval.tables({"vt": {"512": cell, "1024": low}})
    assert summary["vt"]["512"]["counts"]
    assert not summary["vt"]["1024"]["counts"]
    assert summary["vt"]["512"]["full"] == 0.75
    assert summary["vt"]["512"]["m"]["0.25"][0] == 0.5
    assert "vt, 512 tokens, 2 samples" in capsys.readouterr().out


@pytest.mark.slow("reads and merges the caches of a random model")
def test_quick_run(tmp_path):
    path = tmp_path / "results.json"
    script = "benchmarks/lm_retrieval.py", "--quick", "--json", path
    done = subprocess.run(
        [sys.executable, *script], cwd=FOLDER.parent, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "qm_cupy" in done.stdout
    cell = json.loads(path.read_text(encoding="utf-8"))["niah_single_1"]["500"]
    assert len(cell["full"]) == 1
    assert "merge_kv_cache, second reading" in cell["methods"]
    for budgets in cell["methods"].values():
        assert {*budgets} == {"0.25", "0.1"}
        assert all(len(x) == 1 for x in budgets.values())


def test_a_second_reading_answers_most():
    """On the tasks that count, by the mean of their scores at 512 tokens."""
    path = FOLDER / "results" / "ruler.json"
    cells = [x["512"] for x in json.loads(path.read_text()).values() if "512" in x]
    cells = [x for x in cells if x["methods"]]
    assert len(cells) == 6
    for budget, least in (("0.25", 0.75), ("0.1", 0.6)):
        means = {
            name: np.mean([np.mean(x["methods"][name][budget]) for x in cells])
            for name in cells[0]["methods"]
        }
        best = means.pop("merge_kv_cache, second reading")
        assert best > max(means.values())
        assert best > least
