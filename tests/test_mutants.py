"""The list of planted faults fits the project; `mutants.py` runs the faults."""

import os
import re
import subprocess
import sys

import mutants
import pytest

FAULTS = mutants.read_faults()


def test_every_fault_can_be_planted():
    """A change of a source may make a fault's `old` text outdated."""
    assert len(FAULTS) >= 60  # an empty list would pass, too
    assert mutants.mistakes(FAULTS) == []


def collected(paths: list[str]) -> dict[str, list[str]]:
    """Return the tests that pytest collects for each path, as `file::name`."""
    # One run of pytest for all paths: collection takes seconds.
    files = sorted({path.partition("::")[0] for path in paths})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--every-case"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files], cwd=mutants.ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(mutants.ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    tests = re.findall(r"^tests/(\S+::.+)$", done.stdout, re.MULTILINE)
    # A path names a file, a test, or a test with the parameters that follow it.
    return {
        path: [test for test in tests if re.match(rf"{re.escape(path)}(::|\[|$)", test)]
        for path in paths
    }


def is_selected(test: str, words: str) -> bool:
    """Return whether `pytest -k` selects a test."""

    # Replace each word by True if the test's name contains it, and keep the operators:
    # the result is a Python expression.
    def replacement(word: re.Match) -> str:
        operator = word[0] in ("and", "or", "not")
        return word[0] if operator else str(word[0].lower() in test.lower())

    return not words or eval(re.sub(r"[^\s()]+", replacement, words))


@pytest.mark.slow("collects the tests that faults name")
def test_every_fault_has_tests():
    """A renamed test would leave a fault that no test can catch."""
    selections = {fault.tests: mutants.selected(fault.tests) for fault in FAULTS}
    paths = {x for named in selections.values() for x in named if ".py" in x}
    tests = collected(sorted(paths))
    for selection, named in selections.items():
        words = named[-1] if "-k" in named else ""
        for path in paths.intersection(named):
            remaining = [test for test in tests[path] if is_selected(test, words)]
            assert remaining, f"{selection}: selects no test in {path}"
