"""The benchmark of language models: its parts, on a random model, and its figures."""

import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from benchmark_scripts import loaded

import qm_cupy as qm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
NAMES = (
    "cache_budgets",
    "cache_methods",
    "cache_reading",
    "documents",
    "language_model",
    "lm_continuation",
    "smollm2",
)
LENGTH = 300  # tokens of the prompt


@pytest.fixture(scope="module")
def scripts():
    """Return modules of benchmarks/, which import each other by name."""
    with loaded(*NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.smollm2.random_model()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 256, LENGTH + 20).tolist()


@pytest.fixture(scope="module")
def prompt(scripts, model, ids):
    return scripts.cache_reading.read(model, ids[:LENGTH])


class TestReading:
    def test_keys_values_and_attention(self, model, ids, prompt):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([ids[:LENGTH]]), cache=cache)
        for i, layer in enumerate(cache.layers):
            torch.testing.assert_close(prompt.keys[i], layer.keys)
            torch.testing.assert_close(prompt.values[i], layer.values)
            wanted = qm.score_keys(prompt.queries[i], layer.keys)
            torch.testing.assert_close(prompt.received[i], wanted)

    def test_the_second_reading_has_other_queries(self, scripts, prompt):
        count = min(LENGTH, scripts.cache_reading.REPEATED)
        for first, again in zip(prompt.queries, prompt.repeated, strict=True):
            assert again.shape[-2] == count
            # The positions, and what was read before, are others.
            assert (again - first[:, :, -count:]).abs().max() > 0.1

    def test_predictions_with_all_entries(self, scripts, model, ids, prompt):
        got = scripts.cache_reading.predict(model, prompt, prompt.whole, ids[LENGTH:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, LENGTH:]
        torch.testing.assert_close(got, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)

    def test_text(self, scripts, model, ids, prompt):
        arguments = model, prompt, prompt.whole, ids[LENGTH:]
        got = scripts.cache_reading.generate(*arguments, 8)
        text = torch.tensor([ids])
        wanted = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=8,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert got == wanted[0, len(ids) :].tolist()
        stop = frozenset(got[3:4])
        first = got.index(got[3])
        assert scripts.cache_reading.generate(*arguments, 8, stop) == got[:first]


class TestMethods:
    def test_each_keeps_its_budget(self, scripts, prompt):
        methods = scripts.cache_methods
        every = {**methods.OURS, **methods.VARIANTS, **methods.SELECTED}
        for name, shorten in every.items():
            layers = shorten(prompt, 75)
            present = [x.bias.isfinite().sum(-1).float().mean() for x in layers]
            # The mean of all heads and layers.
            assert float(np.mean(present)) == pytest.approx(75, abs=0.5), name
            for layer in layers:
                assert layer.keys.shape == layer.values.shape
                assert layer.bias.shape == layer.keys.shape[:-1]
                assert layer.keys.isfinite().all()

    def test_layers_of_pyramidkv_are_a_line(self, scripts, prompt):
        method = scripts.cache_methods.SELECTED["PyramidKV"]
        counts = [x.keys.shape[-2] for x in method(prompt, 60)]
        assert counts == [90, 60, 30]

    def test_one_budget_keeps_a_mean_of_k(self, scripts, prompt):
        reading = scripts.cache_reading
        for shorten in scripts.cache_budgets.ONE_BUDGET.values():
            assert reading.mean_kept(shorten(prompt, 75)) == pytest.approx(75, abs=0.5)

    def test_every_setting_has_a_name(self, scripts):
        candidates = scripts.language_model.candidates()
        budgets = scripts.cache_budgets.ONE_BUDGET_CONTENDERS
        lists = [*scripts.cache_methods.CONTENDERS.values(), *budgets.values()]
        assert list(candidates.values()) == [x for some in lists for x in some]

    def test_tuning_goes_on_where_it_ended(self, scripts, model, monkeypatch):
        script = scripts.language_model
        names = "H2O recent=0.5 total=False", "sinks and recent"
        some = {name: script.candidates()[name] for name in names}
        monkeypatch.setattr(script, "candidates", lambda: some)
        texts, rows = scripts.documents.byte_documents(2), {}
        assert list(script.tune(model, texts[:1], 64, rows)) == [texts[0].name]
        first = {name: list(row) for name, row in rows.items()}
        del rows[names[0]]  # as if this setting was new
        assert list(script.tune(model, texts, 64, rows)) == [x.name for x in texts]
        assert list(script.tune(model, texts, 64, rows)) == []
        for name, row in rows.items():
            assert row[:1] == first[name]
            assert len(row) == 2
            assert row[0] > 0

    def test_rotations(self, scripts, rng):
        """They are those of the model: keys before the rotation do not differ."""
        from qm_cupy.caches.rotary import rotate

        positions, inv_freq = np.array([0, 3, 100]), 100.0 ** -np.linspace(0, 1, 4)
        x = rng.standard_normal((3, 8)).astype(np.float32)
        rotation = scripts.cache_methods.rotations(positions, inv_freq)
        got = (rotation @ torch.from_numpy(x)[..., None])[..., 0]
        wanted = torch.from_numpy(rotate(x, positions, inv_freq))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    def test_attention_matching_fits_the_second_reading(self, scripts, prompt):
        """Its output is nearer to that of the whole cache than eviction's."""
        query, keys = prompt.repeated[0], prompt.keys[0]
        wanted, _ = qm.attend(query, keys, prompt.values[0])
        errors = []
        for name in ("attention matching", "RMS attention"):
            cache = scripts.cache_methods.SELECTED[name](prompt, 75)[0]
            got, _ = qm.attend(query, cache.keys, cache.values, bias=cache.bias)
            errors.append(float((got - wanted).norm()))
        assert errors[0] < 0.5 * errors[1]


class TestDocuments:
    @pytest.fixture
    def split(self, scripts, monkeypatch):
        """Return the documents of two classes whose tokens are numbers in order."""
        documents = scripts.documents
        size = 40 * 6 * documents.LENGTH
        text = {"a": lambda: "x" * size, "b": lambda: "y" * size}
        monkeypatch.setattr(documents, "CLASSES", text)
        monkeypatch.setattr(documents, "_MAX_CHARACTERS", size)

        def tokenizer(piece):
            start = 0 if piece[0] == "x" else 10**6
            return types.SimpleNamespace(input_ids=list(range(start, start + 5000)))

        return lambda split, count: documents.documents(tokenizer, split, count)

    def test_tuning_and_held_out_documents_are_apart(self, split):
        tuning, held_out = split("tuning", 12), split("held_out", 20)
        names = [{x.name for x in part} for part in (tuning, held_out)]
        assert len(names[0]) == 24
        assert len(names[1]) == 40
        assert not names[0] & names[1]

    def test_any_first_part_has_all_classes(self, split):
        assert [x.name[0] for x in split("held_out", 3)] == ["a", "b"] * 3

    def test_the_same_tokens_follow_contexts_of_every_length(self, scripts, split):
        document = split("tuning", 1)[0]
        for length in (512, 4096):
            context = document.context(length)
            assert len(context) == length
            assert context[-1] + 1 == document.continuation[0]
        assert len(document.continuation) == scripts.documents.PREDICTED + 1

    def test_too_few_documents_are_refused(self, split):
        with pytest.raises(ValueError, match="a has 13 documents, not 14"):
            split("tuning", 14)

    def test_pythons_reference(self, scripts):
        documents = scripts.documents.byte_documents(2)
        assert documents[0].ids != documents[1].ids
        assert max(documents[0].ids) < 256


def setting(method):
    """Return what distinguishes the settings of a method from others."""
    if isinstance(method, tuple):
        return method.text
    return method.func, method.keywords


@pytest.mark.slow("shortens the caches of a random model")
@pytest.mark.rehearsal
def test_quick_tuning(tmp_path):
    path = tmp_path / "results.json"
    script = "benchmarks/language_model.py", "--quick", "--tune", "--json", path
    subprocess.run([sys.executable, *script], cwd=ROOT, check=True)
    rows = json.loads(path.read_text(encoding="utf-8"))["tuning"]
    assert all(len(row) == 1 and math.isfinite(row[0]) for row in rows.values())


@pytest.mark.slow("reads and merges the caches of a random model")
@pytest.mark.rehearsal
def test_quick_run(tmp_path):
    path = tmp_path / "results.json"
    script = "benchmarks/language_model.py", "--quick", "--json", path
    done = subprocess.run(
        [sys.executable, *script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "qm_cupy" in done.stdout
    report = json.loads(path.read_text(encoding="utf-8"))["continuation"]["512"]
    for row in report["methods"].values():
        for cell in row.values():
            assert len(cell["kl"]) == len(cell["loss"]) == len(report["documents"])
            assert all(map(math.isfinite, cell["kl"] + cell["loss"]))


class TestFigures:
    """What README.md and the scripts say is what the benchmark has written."""

    budgets = "0.5", "0.25", "0.1", "0.05"
    rows = {  # noqa: RUF012
        "`merge_kv_cache`, `per_layer`, `per_head`": (
            "merge_kv_cache, per_layer, per_head"
        ),
        "`merge_kv_cache`, `per_layer`": "merge_kv_cache, per_layer",
        "`merge_kv_cache`": "merge_kv_cache",
        "attention matching": "attention matching",
        "eviction by RMS attention": "RMS attention",
        "eviction by H2O's score": "H2O",
        "eviction by SnapKV's score": "SnapKV",
        "ToMe's matching of keys": "ToMe matching",
        "the first 4 and the most recent": "sinks and recent",
    }
    twice = {  # noqa: RUF012
        "`merge_kv_cache`, the text read twice": "merge_kv_cache, second reading",
        "eviction by KVzip's score, the text read twice": "KVzip",
    }

    @pytest.fixture
    def results(self):
        path = ROOT / "benchmarks" / "results" / "language_model.json"
        return json.loads(path.read_text(encoding="utf-8"))["continuation"]

    @pytest.fixture
    def more(self):
        path = ROOT / "benchmarks" / "results" / "language_model.json"
        return json.loads(path.read_text(encoding="utf-8"))["more"]["1024"]

    def test_selected_settings_have_the_least_divergence(self, scripts):
        path = ROOT / "benchmarks" / "results" / "language_model.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["tuning"]
        candidates = scripts.language_model.candidates()
        assert rows.keys() == candidates.keys()
        assert {len(row) for row in rows.values()} == {6}  # documents
        methods, budgets = scripts.cache_methods, scripts.cache_budgets
        pairs = (
            (methods.SELECTED, methods.CONTENDERS),
            (budgets.ONE_BUDGET, budgets.ONE_BUDGET_CONTENDERS),
        )
        names = {id(method): name for name, method in candidates.items()}
        for selected, lists in pairs:
            assert selected.keys() == lists.keys()
            for name, some in lists.items():
                best = min(some, key=lambda x: np.mean(rows[names[id(x)]]))
                assert setting(selected[name]) == setting(best), name

    @pytest.fixture
    def readme(self):
        return (ROOT / "README.md").read_text(encoding="utf-8")

    @staticmethod
    def mean(part, name, budget):
        return float(np.mean(part["methods"][name][budget]["kl"]))

    def test_the_table(self, results, more, readme):
        part = results["1024"]
        assert more["documents"] == part["documents"]
        both = {"methods": more["methods"] | part["methods"]}
        for title, name in {**self.rows, **self.twice}.items():
            cells = re.search(rf"^\| {re.escape(title)} \| (.*) \|$", readme, re.M)[1]
            wanted = [f"{self.mean(both, name, b):.4f}" for b in self.budgets]
            assert cells.replace("*", "").split(" | ") == wanted
        assert f"{len(part['documents'])} held-out documents" in readme

    def test_the_sentence(self, results, readme):
        part, ours = results["1024"], "merge_kv_cache, per_layer"
        kl = {name: self.mean(part, name, "0.25") for name in part["methods"]}
        loss = np.mean(part["methods"][ours]["0.25"]["loss"])
        rise = np.expm1(loss - np.mean(part["full"]["loss"]))
        text = " ".join(readme.split())
        assert f"{kl[ours] / kl['SnapKV']:.2f} of SnapKV's" in text
        assert f"{kl[ours] / kl['RMS attention']:.2f} of that of RMS attention" in text
        assert f"rises by {100 * rise:.1f} %" in text

    def test_the_sentence_of_a_second_reading(self, more, readme):
        loss = more["methods"]["merge_kv_cache, second reading"]["0.25"]["loss"]
        rise = np.expm1(np.mean(loss) - np.mean(more["full"]["loss"]))
        text = " ".join(readme.split())
        assert f"perplexity at 25 % rises by {100 * rise:.1f} %" in text
        # It loses less than every method that reads once, at a quarter.
        names = more["methods"].keys() - {"merge_kv_cache, second reading"}
        least = min(self.mean(more, name, "0.25") for name in names)
        assert self.mean(more, "merge_kv_cache, second reading", "0.25") < least

    def test_the_speed(self, readme):
        path = ROOT / "benchmarks" / "results" / "lm_speed.json"
        run = json.loads(path.read_text(encoding="utf-8"))["sizes"][-1]
        text = " ".join(readme.split())
        assert run["entries"] == 32768
        assert f"decodes {run['speed-up']['0.1']:.2f} times as many tokens" in text
        assert f"pays after {run['pays after']['0.1']:.0f} tokens" in text

    @pytest.mark.parametrize("length", ["512", "1024", "2048", "4096"])
    def test_a_quarter_of_the_cache(self, results, scripts, length):
        """Less divergence than every eviction, and half of that of the best."""
        part = results[length]
        names = {*scripts.cache_methods.SELECTED} - {"attention matching"}
        least = min(self.mean(part, name, "0.25") for name in names)
        for name in ("merge_kv_cache, per_layer", "merge_kv_cache, per_head"):
            kl = self.mean(part, name, "0.25")
            assert kl < 0.5 * least
            assert kl < 0.35 * self.mean(part, "SnapKV", "0.25")
            assert kl < self.mean(part, "attention matching", "0.25")
        # The perplexity is within 5 % of that of the whole cache.
        loss = part["methods"]["merge_kv_cache, per_layer"]["0.25"]["loss"]
        assert np.mean(loss) - np.mean(part["full"]["loss"]) < np.log(1.05)
