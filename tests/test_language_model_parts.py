"""Speed, hidden states and pictures of the language model, on a random model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_scripts import loaded

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
NAMES = (
    "cache_reading",
    "language_model_plot",
    "lm_hidden_states",
    "lm_speed",
    "lm_stream",
    "smollm2",
)
LENGTH = 200


@pytest.fixture(scope="module")
def scripts():
    """Return modules of benchmarks/, which import each other by name."""
    with loaded(*NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.smollm2.random_model()


@pytest.fixture(scope="module")
def prompt(scripts, model):
    ids = np.random.default_rng(0).integers(0, 256, LENGTH).tolist()
    return scripts.cache_reading.read(model, ids)


class TestHiddenStates:
    def test_layers_that_read_all_tokens(self, scripts, model, prompt):
        """They store what the model has stored."""
        module = scripts.lm_hidden_states
        states = module.hidden_states(model, prompt)
        for first in (0, 2):
            ones, positions = torch.ones(LENGTH), torch.arange(LENGTH)
            arguments = states[first], ones, positions, first
            for i, layer in enumerate(module.later_layers(model, *arguments)):
                for name in ("keys", "values"):
                    wanted = getattr(prompt, name)[first + i]
                    got = getattr(layer, name)
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    def test_a_token_of_size_two_counts_twice(self, scripts, model, prompt):
        """Two equal tokens at one position are one token of size 2."""
        module = scripts.lm_hidden_states
        state = module.hidden_states(model, prompt)[1][:, :6]
        twice = state.repeat_interleave(2, 1)
        positions = torch.arange(6)
        arguments = torch.ones(12), positions.repeat_interleave(2), 1
        long = module.later_layers(model, twice, *arguments)
        short = module.later_layers(model, state, 2 * torch.ones(6), positions, 1)
        # The second of two equal tokens reads both; the first reads itself once.
        torch.testing.assert_close(long[1].values[:, :, 1::2], short[1].values)

    def test_merged_tokens(self, scripts, prompt):
        received = torch.rand(LENGTH)
        tokens, sizes, positions = scripts.lm_hidden_states.merged(
            torch.randn(1, LENGTH, 16), received, 60
        )
        assert tokens.shape == (1, 60, 16)
        assert sizes.sum() == LENGTH
        assert (positions.diff() > 0).all()
        assert positions[-20:].tolist() == list(range(LENGTH - 20, LENGTH))
        assert sizes[:4].tolist() == [1, 1, 1, 1]

    def test_tokens_that_remain(self, scripts):
        module, received = scripts.lm_hidden_states, torch.zeros(LENGTH)
        received[[50, 70]] = 1.0
        # Four sinks, the last fourteen, and the ten with the most attention.
        kept = module.by_attention(received, 28).tolist()
        assert kept == sorted(kept)
        assert len(kept) == 28
        assert {0, 1, 2, 3, 50, 70, *range(LENGTH - 14, LENGTH)} <= set(kept)
        recent = module.most_recent(LENGTH, 28).tolist()
        assert recent == [0, 1, 2, 3, *range(LENGTH - 24, LENGTH)]


class TestStream:
    def test_constant_memory(self, scripts, model):
        """Every contender stores its budget, except the tokens since the last merge."""
        module = scripts.lm_stream
        ids = np.arange(230).tolist()
        report = module.measure(model, ids, (128, 96, 32), 64)
        assert set(report["stored"]) == {*module.CONTENDERS, "KVStream"}
        assert set(report["stored"].values()) == {64}
        for name in report["stored"]:
            assert np.isfinite(report[name]).all()

    def test_budgets_of_all_tokens_change_nothing(self, scripts, model):
        ids = np.arange(230).tolist()
        report = scripts.lm_stream.measure(model, ids, (128, 96, 32), 300)
        for name in report["stored"]:
            assert report[name][0] < 1e-6
            assert report[name][1] == pytest.approx(report["full"], abs=1e-5)

    def test_generated_text(self, scripts, model):
        """It is drawn from the model's probabilities, the same in every run."""
        ids = np.arange(40).tolist()
        text = scripts.lm_stream.generated(model, ids, 30)
        assert text[:40] == ids
        assert text == scripts.lm_stream.generated(model, ids, 30)
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, 39:-1]
        best = logits.argmax(-1).tolist()
        assert len(best) == 30
        assert text[40:] != best  # not the most probable ones


class TestSpeed:
    def test_figures(self, scripts, model, capsys):
        report = scripts.lm_speed.speed(model, 512, steps=2)
        # Keys, values and biases of 3 layers and 2 heads of width 16, in float32.
        assert report["bytes"]["all"] == 4 * 3 * 2 * 512 * 33
        for name in ("0.25", "0.1"):
            wanted = 4 * 3 * 2 * int(512 * float(name)) * 33
            assert report["bytes"][name] == pytest.approx(wanted, rel=0.02)
        for quartiles in report["token seconds"].values():
            assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]
        assert "512 entries" in capsys.readouterr().out

    def test_when_it_pays(self, scripts, capsys):
        report = {
            "entries": 100,
            "bytes": {"all": 4, "0.25": 1, "0.1": 1},
            "merge seconds": {"0.25": 3.0, "0.1": 3.0},
            "received seconds": 1.0,
            "token seconds": {"all": [1, 2, 3], "0.25": [1, 1.5, 3], "0.1": [2, 2, 2]},
        }
        scripts.lm_speed.add_gains(report)
        assert report["pays after"] == {"0.25": 8.0, "0.1": None}
        assert report["speed-up"]["0.25"] == pytest.approx(4 / 3)
        assert "never" in capsys.readouterr().out


class TestPictures:
    def test_coloured_text(self, scripts):
        text = scripts.language_model_plot.coloured_text(
            ["a", "<b>", "c\n", "d", "e"], [3, 5, 3, 7, 5]
        )
        assert "&lt;b&gt;" in text
        assert "c↵<br>" in text
        spans = text.split("<span ")[1:]
        colours = [x.split('"')[1] for x in spans]
        assert colours[0] == colours[2] != colours[1] == colours[4]
        assert colours[3] == "color:#999"

    def test_plot(self, scripts, tmp_path, rng):
        plot = scripts.language_model_plot
        methods = {
            name: {
                b: {"kl": rng.random(5).tolist(), "loss": rng.random(5).tolist()}
                for b in ("0.5", "0.25", "0.1", "0.05")
            }
            for name in plot.LINES
        }
        methods["at one budget"] = {"0.25": methods["H2O"]["0.25"]}
        common = {"documents": list("abcde"), "full": {"loss": [0.1] * 5}}
        again = {"KVzip", "merge_kv_cache, second reading"}
        report = {
            part: {plot.LENGTH: {"methods": {x: methods[x] for x in names}, **common}}
            for part, names in (("continuation", {*methods} - again), ("more", again))
        }
        path = tmp_path / "picture.png"
        plot.plot(report, path)
        assert path.read_bytes()[1:4] == b"PNG"


@pytest.mark.slow("starts a process")
@pytest.mark.rehearsal
@pytest.mark.parametrize("script", ["lm_speed", "lm_hidden_states", "lm_stream"])
def test_quick_run(script, tmp_path):
    path = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--quick", "--json", path],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "qm_cupy" in done.stdout
    assert json.loads(path.read_text(encoding="utf-8"))
