"""A projection and a prior learn through the merge, in torch and in JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rehearsal

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training.py"


@pytest.fixture(scope="module")
def courses(tmp_path_factory):
    """Return loss and PSNR of the whole photograph for each step and framework."""
    results = {}
    for framework in ("torch", "jax"):
        pytest.importorskip(framework)
        pytest.importorskip("matplotlib")
        path = tmp_path_factory.mktemp(framework) / "figures.json"
        command = [sys.executable, SCRIPT, "--framework", framework, "--quick"]
        done = subprocess.run(
            [*command, "--json", path], check=True, capture_output=True, text=True
        )
        assert "PSNR" in done.stdout
        results[framework] = json.loads(path.read_text())["steps"]
    return results


@pytest.mark.slow("trains in torch and in JAX")
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_both_improve(courses, framework):
    losses = [step["loss"] for step in courses[framework]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    psnr = [step["psnr"] for step in courses[framework]]
    # In dB: the rebuilt image must improve too.
    assert psnr[-1] > psnr[0] + 4


def test_both_frameworks_give_the_same_course(courses):
    # Small differences in rounding grow with the steps, so the bounds are wide.
    for ours, theirs in zip(*courses.values(), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=0.2)
