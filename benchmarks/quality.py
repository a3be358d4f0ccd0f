"""Measure what merging loses on real tokens, by method: text, search and pictures.

    python benchmarks/quality.py [--quick] [--json PATH] [--plot PATH] [--peers FOLDER]

Task 1, text (quality_text.py): passages of Python's language reference and of the
licences of installed packages go through a sentence encoder, which merges their tokens
after one layer or in all layers.

Task 2, search (quality_search.py): late-interaction search among sections of the same
text. The vectors of the sections are merged by a factor.

Task 3, pictures (quality_pictures.py): patches of photographs, rebuilt from the merged
patches.

contenders.py has our ways to merge, peers.py and packages.py have others. In text and
search, [CLS] and [SEP] stay tokens of their own, and count as such, for each contender
whose name does not say "nothing protected".

Figures are means over documents (or tiles), with 95 % intervals by a bootstrap over
documents (or tiles). Queries of one document are averaged first.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
from minilm import MiniLM
from quality_pictures import pictures
from quality_plot import plot
from quality_search import SECTION, search
from quality_tables import Report
from quality_text import text
from report import write_json
from texts import documents, licences

import qm_cupy as qm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG")
    parser.add_argument(
        "--peers", help="folder with packages of peers; see packages.py"
    )
    options = parser.parse_args()
    quick, start = options.quick, time.perf_counter()
    model = MiniLM()
    python = platform.python_version()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    print(f"qm_cupy {qm.__version__}, {machine}, text of Python {python}")
    limit = 3 if quick else None
    texts = documents(model, limit, SECTION) + licences(model, limit, SECTION)
    # Only now, because the texts include the licences of all packages that are found.
    if options.peers:
        sys.path.append(options.peers)
    report: Report = {"machine": machine, "python": python}
    report["text"] = text(texts, quick)
    report["search"], missing = search(model, texts, quick)
    report["pictures"], more = pictures(quick)
    report["not run"] = missing | more
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if options.plot:
        plot(report, options.plot)
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
