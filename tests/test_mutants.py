"""The list of seeded faults fits the project it is for; `mutants.py` runs it."""

import os
import re
import subprocess
import sys

import mutants
import pytest

FAULTS = mutants.read_faults()


def test_every_fault_can_be_planted():
    assert len(FAULTS) >= 60
    assert mutants.mistakes(FAULTS) == []


def collected(paths: list[str]) -> dict[str, list[str]]:
    """Return the tests that pytest finds for each path, as `file::name`."""
    files = sorted({path.partition("::")[0] for path in paths})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--every-case"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files], cwd=mutants.ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(mutants.ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    tests = re.findall(r"^tests/(\S+::.+)$", done.stdout, re.MULTILINE)
    return {
        path: [test for test in tests if re.match(rf"{re.escape(path)}(::|\[|$)", test)]
        for path in paths
    }


def chosen(test: str, words: str) -> bool:
    """Return whether `pytest -k` chooses a test: a word may stand anywhere in it."""

    def found(word: re.Match) -> str:
        operator = word[0] in ("and", "or", "not")
        return word[0] if operator else str(word[0].lower() in test.lower())

    return not words or eval(re.sub(r"[^\s()]+", found, words))


@pytest.mark.slow("collects the tests that faults name")
def test_every_fault_has_tests():
    selections = {fault.tests: mutants.selected(fault.tests) for fault in FAULTS}
    paths = {x for named in selections.values() for x in named if ".py" in x}
    tests = collected(sorted(paths))
    for selection, named in selections.items():
        words = named[-1] if "-k" in named else ""
        for path in paths.intersection(named):
            found = [test for test in tests[path] if chosen(test, words)]
            assert found, f"{selection}: no test in {path}"
