"""Compare the outputs that notebooks store with those of the documentation's build.

    python docs/notebook_outputs.py [--write NOTEBOOK ...]

The build runs a copy of every notebook, and leaves it in build/jupyter_execute. The
outputs in notebooks/ must have the same texts as those of this run, with numbers that
differ by at most a tenth, because processors and libraries round differently. Colours
and pictures are not compared. `--write` first stores the outputs of the run in these
notebooks.

A notebook may also be stored without any output.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]

ROOT = Path(__file__).parent.parent
RUN = ROOT / "build" / "jupyter_execute" / "notebooks"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TAG = re.compile(r"<[^>]*>")
TOLERANCE = 0.1  # relative
LAST_DIGIT = 1e-4  # absolute, for small numbers with four decimals


def read(path: Path) -> dict[str, Any]:
    """Return a notebook."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code(notebook: dict[str, Any]) -> list[Cell]:
    """Return the cells with code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(cell: Cell) -> list[dict[str, Any]]:
    """Return the outputs of a cell without those on stderr, such as progress bars."""
    result: list[dict[str, Any]] = []
    for output in cell["outputs"]:
        # The first text of a build has what is printed later, too.
        later = any(x["output_type"] == "stream" for x in result)
        if output["output_type"] != "stream" or (
            output["name"] == "stdout" and not later
        ):
            result.append(output)
    return result


def text_of(output: dict[str, Any]) -> str:
    """Return what a reader sees of an output, without colours."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output["data"]
    if "text/html" in data:
        return TAG.sub("", "".join(data["text/html"]))
    # The text beside a picture names an object and its address.
    names = sorted(data)
    return "".join(data["text/plain"]) if names == ["text/plain"] else str(names)


def alike(stored: str, run: str) -> bool:
    """Return whether two texts are equal, except the rounding of their numbers."""
    if NUMBER.sub("#", stored) != NUMBER.sub("#", run):
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(run), strict=True)
    return all(
        abs(float(a) - float(b)) <= TOLERANCE * abs(float(b)) + LAST_DIGIT
        for a, b in pairs
    )


def differences(stored: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Return the ids of the cells whose stored outputs are not those of the run."""
    result = []
    for old, new in zip(code(stored), code(run), strict=True):
        texts = [[text_of(x) for x in outputs(cell)] for cell in (old, new)]
        same = len(texts[0]) == len(texts[1]) and all(map(alike, *texts))
        if not same or old["source"] != new["source"]:
            result.append(str(old["id"]))
    return result


def write(path: Path, run: dict[str, Any]) -> None:
    """Store the outputs of a run in a notebook."""
    notebook = read(path)
    pairs = zip(code(notebook), code(run), strict=True)
    for number, (cell, new) in enumerate(pairs, start=1):
        cell["execution_count"] = number
        cell["outputs"] = outputs(new)
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Write the notebooks that are named, and compare all that have outputs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", nargs="+", type=Path, metavar="NOTEBOOK")
    options = parser.parse_args()
    for path in options.write or []:
        write(path, read(RUN / path.name))
    failed = False
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        stored = read(path)
        if not any(cell["execution_count"] for cell in code(stored)):
            continue  # it has no outputs
        cells = differences(stored, read(RUN / path.name))
        if cells:
            failed = True
            print(
                f"{path.name}: the outputs of {', '.join(cells)} are not those of the "
                "build: run `python docs/notebook_outputs.py --write "
                f"notebooks/{path.name}`, and look at the difference"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
