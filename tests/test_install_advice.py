"""Advice to install a package: it works in a checkout, and names the same versions."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import qm_cupy as qm
from qm_cupy import install_advice
from qm_cupy.arrays import libraries
from qm_cupy.cli import doctor
from qm_cupy.cli.main import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
FOR_USERS = {
    "plot", "text", "cli", "torch", "jax", "transformers", "cuda12", "cuda13",
    "safetensors", "bfloat16", "lm",
}  # fmt: skip
FOR_DEVELOPERS = {"nvrtc", "notebooks", "test", "docs", "lint", "dev"}


def test_extras_are_named_by_what_people_do():
    assert set(EXTRAS) == FOR_USERS | FOR_DEVELOPERS


def test_the_requirements_are_those_of_the_extras():
    requirements = dict(install_advice.REQUIREMENTS)
    # The extra `cli` has two packages, `transformers` has other extras too, and `lm` is
    # also for the benchmarks of language models. Others have one package.
    assert requirements.pop("gguf") in EXTRAS["lm"]
    assert EXTRAS["cli"] == [requirements.pop("tqdm"), requirements.pop("shtab")]
    several = {"text", "cli", "transformers", "lm"}
    single = {extra: EXTRAS[extra] for extra in FOR_USERS - several}
    assert single == {k: [v] for k, v in requirements.items()}


def test_the_pinned_versions_satisfy_the_requirements():
    """CI installs what constraints.txt pins; users get a range."""
    specifiers = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for name, text in install_advice.REQUIREMENTS.items():
        if name in ("cuda12", "cuda13"):
            continue  # CI has no GPU
        requirement = specifiers.Requirement(text)
        assert requirement.specifier.contains(pinned[requirement.name])


def test_no_text_advises_to_install_the_package_from_an_index():
    """It is not on an index; `pip install ".[plot]"` works in a checkout."""
    wrong = re.compile(r"pip install [^\n]*qm[-_]cupy")
    folders = "qm_cupy", "docs", "notebooks", "benchmarks", "kernels"
    files = [ROOT / "README.md", ROOT / "Makefile"]
    for folder in folders:
        for suffix in ("py", "md", "rst", "ipynb", "sh"):
            files += (ROOT / folder).rglob(f"*.{suffix}")
    assert [f for f in files if wrong.search(f.read_text(encoding="utf-8"))] == []


def test_messages_without_cupy(monkeypatch):
    class OnGPU:
        def __dlpack__(self):
            raise AssertionError("must not be read")

        def __dlpack_device__(self):
            return 2, 0  # kDLCUDA

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError) as error:
        qm.quickmerge(OnGPU(), 3)
    assert str(error.value) == (
        "`tokens` is on a CUDA device, which needs CuPy: pip install "
        '"cupy-cuda13x[ctk]>=14.2,<15" (cupy-cuda12x for a driver of CUDA 12)'
    )


def test_messages_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r'needs ml_dtypes: pip install "ml_dtypes>='):
        libraries.bfloat16("tokens")


def test_messages_of_the_demo_without_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert 'the demo needs matplotlib: pip install "matplotlib>=' in error


def test_doctor_names_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for name in install_advice.REQUIREMENTS.keys() - {"cuda12"}:
        assert install_advice.install_command(name) in report
