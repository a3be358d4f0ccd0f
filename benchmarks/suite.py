"""Report how long the tests take: seconds of each test file and of each part.

    make check && python benchmarks/suite.py [--json FILE]

The script reads the reports that the targets of `make check` leave in build/, and
writes the JSON for the tables of docs/project/testing.md. Seconds of tests are those of
one process; each core runs one process.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from machine import cpu

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("test", "machine-code", "rehearse")  # each has a JUnit report in build/


def file_of(case: ElementTree.Element) -> str:
    """Return the file of a test, from its class name, such as tests.test_it.TestIt."""
    words = case.get("classname", "").split(".")
    # Modules are in lower case; a class starts with a capital.
    modules = [word for word in words if not word[:1].isupper()]
    return "/".join(modules) + ".py"


def read(path: Path) -> dict[str, dict[str, float]]:
    """Return tests and seconds of each file of a JUnit report, slowest file first."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        seconds[file_of(case)] += float(case.get("time", 0))
        tests[file_of(case)] += 1
    return {
        file: {"tests": tests[file], "seconds": round(taken, 1)}
        for file, taken in seconds.most_common()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "suite.json"
    )
    options = parser.parse_args()
    paths = {part: ROOT / "build" / f"{part}.xml" for part in PARTS}
    walls = ROOT / "build" / "seconds.txt"
    missing = [str(path) for path in (*paths.values(), walls) if not path.is_file()]
    if missing:
        sys.exit(f"missing files: {', '.join(missing)}; `make check` writes them")
    # Each line is a target of make and its seconds.
    lines = walls.read_text(encoding="utf-8").splitlines()
    report = {
        "machine": cpu(),
        "targets": {target: int(taken) for target, taken in map(str.split, lines)},
        "parts": {part: read(path) for part, path in paths.items()},
    }
    for target, taken in report["targets"].items():
        print(f"make {target}: {taken} s, including the installation")
    for part, files in report["parts"].items():
        # Seconds of one process, so their sum can exceed the time of the target.
        print(f"make {part}: {sum(x['seconds'] for x in files.values()):.0f} s")
        for file, counts in files.items():
            print(f"  {counts['seconds']:8.1f} s  {counts['tests']:5d} tests  {file}")
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
