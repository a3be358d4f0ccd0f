"""Plant faults: do the tests detect a mistake that a developer may make?

    python tests/mutants.py [--only NAME ...] [--json FILE] [--processes N]

Each fault of tests/faults/*.toml replaces a piece of one file in a copy of the tree;
the tree itself never changes. Then the tests that the fault names run in the copy,
until the first one fails. Before that, every selection of tests must pass in a copy
without a fault.
Exit status: 0 if every fault is caught, 1 if one is missed, 2 if the list is wrong.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
COPIES = ROOT / "build" / "mutants"
COPIED = "pyproject.toml", "qm_cupy", "kernels", "tests", "benchmarks"
LIMIT = 300  # seconds; a run that takes longer counts as endless, so it is caught
# Abbreviations in the selections. One 16-bit dtype is enough, and it reaches the code
# for tensor cores.
SHORT = {"HALF": "float16 and not bfloat16", "FAST": "optimized and not optimized-75"}
# The line of pytest's summary that names a failed test.
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


Record = dict[str, object]


class Fault(NamedTuple):
    """A mistake in one file, and the tests that should detect it."""

    name: str
    kind: str  # such as "barrier" or "off by one"
    file: str  # relative to the root of the repository
    old: str  # a text that occurs exactly once in the file
    new: str
    tests: str  # arguments of pytest, which runs in tests/
    note: str  # the effect of the mistake


class Outcome(NamedTuple):
    """How a run of pytest ended."""

    status: int  # exit status
    failed: str  # the first test that failed, or the reason why the run ended
    output: str
    seconds: float


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def read_faults() -> list[Fault]:
    """Return all faults, in the order of their files."""
    tables = [tomllib.loads(path.read_text()) for path in sorted(FAULTS.glob("*.toml"))]
    return [Fault(**entry) for table in tables for entry in table["fault"]]


def mistakes(faults: list[Fault]) -> list[str]:
    """Return the problems of the list itself, such as an outdated `old` text."""
    problems = []
    names = [fault.name for fault in faults]
    for fault in faults:
        if names.count(fault.name) > 1:
            problems.append(f"{fault.name}: more than one fault has this name")
        times = (ROOT / fault.file).read_text().count(fault.old)
        if times != 1:
            problems.append(f"{fault.name}: old text is {times} times in {fault.file}")
        if fault.old == fault.new:
            problems.append(f"{fault.name}: changes nothing")
    return problems


def selected(tests: str) -> list[str]:
    """Return pytest's arguments for a selection, without abbreviations."""
    for short, words in SHORT.items():
        tests = re.sub(rf"\b{short}\b", words, tests)
    return shlex.split(tests)


def run_tests(tests: str, fault: Fault | None, folder: Path) -> Outcome:
    """Run a selection in a fresh copy of the tree, with a fault or without."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)
    if fault is not None:
        file = folder / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
    options = "-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE"  # -x: one fails
    command = [sys.executable, "-m", "pytest", *options, *selected(tests)]
    # One thread for each run, because several run at the same time. PYTHONPATH lets the
    # tests import the copy instead of the tree.
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": str(folder)}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder / "tests", env=environment, timeout=LIMIT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        # Python gives the output as bytes here, in spite of `text=True`.
        status, output = 1, (late.stdout or b"").decode(errors="replace")
    seconds = time.perf_counter() - start
    named = FAILED.search(output)
    failed = named[1] if named else f"exit status {status}"
    return Outcome(status, failed if seconds < LIMIT else "no end", output, seconds)


def run_all(faults: list[Fault], processes: int) -> list[Record]:
    """Run every selection without a fault, then every fault; return the records."""
    # A run takes a free copy from the queue and returns it.
    folders: SimpleQueue[Path] = SimpleQueue()
    for number in range(processes):
        folders.put(COPIES / str(number))

    def run(tests: str, fault: Fault | None = None) -> Outcome:
        folder = folders.get()
        try:
            return run_tests(tests, fault, folder)
        finally:
            folders.put(folder)

    def check(tests: str) -> bool:
        outcome = run(tests)
        if outcome.status != 0:
            say(f"without a fault: {tests}\n{outcome.output}")
        return outcome.status == 0

    def record(fault: Fault) -> Record:
        outcome = run(fault.tests, fault)
        caught = outcome.status != 0
        verdict = f"caught by {outcome.failed}" if caught else "MISSED"
        say(f"{fault.name:42} {outcome.seconds:6.1f} s  {verdict}")
        return {
            "fault": fault.name,
            "kind": fault.kind,
            "file": fault.file,
            "caught_by": outcome.failed if caught else None,
            "seconds": round(outcome.seconds, 1),
        }

    COPIES.mkdir(parents=True, exist_ok=True)
    with (COPIES / "lock").open("w") as lock, ThreadPoolExecutor(processes) as pool:
        # Wait while another `mutants.py` uses the same copies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        selections = dict.fromkeys(fault.tests for fault in faults)
        if not all(list(pool.map(check, selections))):
            raise SystemExit(2)
        return list(pool.map(record, faults))


def write_records(path: Path, suite: str, records: list[Record]) -> None:
    """Write the records of a suite; the file keeps all other records."""
    known = json.loads(path.read_text()) if path.exists() else []
    new = {(suite, r["fault"]): {"suite": suite, **r} for r in records}
    merged = {(r["suite"], r["fault"]): r for r in known} | new
    # One record a line, so that a change of one record is a change of one line.
    lines = ",\n".join(f" {json.dumps(r)}" for r in merged.values())
    path.write_text(f"[\n{lines}\n]\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="print the faults and run nothing")
    add("--only", nargs="+", metavar="NAME", help="run only these faults")
    add("--json", type=Path, metavar="FILE", help="write which test caught each fault")
    add("--suite", default="", help="name of the tests in the JSON (default: commit)")
    add("--processes", type=int, default=1, metavar="N")
    return parser.parse_args()


def main() -> int:
    options, faults = arguments(), read_faults()
    unknown = set(options.only or ()) - {fault.name for fault in faults}
    wrong = mistakes(faults) + [f"{name}: no such fault" for name in sorted(unknown)]
    if wrong:
        say("\n".join(wrong))
        return 2
    if options.only:
        faults = [fault for fault in faults if fault.name in options.only]
    if options.list:
        for fault in faults:
            say(f"{fault.name}: {fault.kind}, {fault.file}\n    {fault.note}")
        return 0
    records = run_all(faults, options.processes)
    missed = [str(r["fault"]) for r in records if r["caught_by"] is None]
    say(
        "\n  ".join([f"{len(records) - len(missed)} of {len(records)} caught", *missed])
    )
    if options.json:
        head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
        write_records(options.json, options.suite or commit, records)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
