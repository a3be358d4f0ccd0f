"""Merge a file that is much larger than the memory that the command may use.

    python benchmarks/huge_file.py [--quick] [--gigabytes G] [--folder F] [--json PATH]

It writes a file of random tokens (B, 256, 768) in float32, 20 GB by default, and runs
`python -m qm_cupy compress` on it with a limit of 1 GB of addresses (`ulimit -v`). It
prints the time, the part of it that the command spends in `quickmerge`, and the peak of
addresses and of memory. The floor of reading is the time of a plain read of the file.
The folder needs room for the file and its result (1.1 times its size); both are deleted
at the end. `--quick` uses a file of 0.1 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

from machine import cpu
from report import write_json

ROOT = Path(__file__).resolve().parent.parent

NUM_TOKENS, DIM = 256, 768
LIMIT = 10**9  # bytes of addresses
# Options of `compress` for each row. The budget is a tenth of the tokens.
CASES: dict[str, tuple[str, ...]] = {
    "average": (),
    "bipartite": ("--method", "bipartite"),
    "ward, at most this error": ("--max-error", "0.9"),
}


def write_tokens(path: Path, gigabytes: float) -> tuple[int, ...]:
    """Write random tokens to a .npy file, and return their shape."""
    shape = (max(1, int(gigabytes * 1e9 / (NUM_TOKENS * DIM * 4))), NUM_TOKENS, DIM)
    tokens = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    rng = np.random.default_rng(0)
    for start in range(0, len(tokens), 100):
        part = tokens[start : start + 100]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    tokens.flush()
    return shape


def read_seconds(path: Path) -> float:
    """Return the seconds of a read of the whole file, without any other work."""
    buffer = bytearray(2**25)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def peaks(process: int) -> dict[str, int]:
    """Return the peaks of addresses and of memory of a process so far, in bytes."""
    fields = {"VmPeak:": "addresses", "VmHWM:": "memory"}
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {fields[x[0]]: int(x[1]) * 1024 for x in words if x and x[0] in fields}


def limit_addresses() -> None:
    """Limit the addresses of this process, as `ulimit -v` does."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


def compress(path: Path, output: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Run the command on a file, and return its summary, seconds and peaks."""
    budget = () if "--max-error" in options else ("--budget", "0.1")
    words = ["compress", str(path), "-o", str(output), "--json", *budget, *options]
    start, peak = time.perf_counter(), {}
    with subprocess.Popen(
        [sys.executable, "-m", "qm_cupy", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=limit_addresses,
    ) as process:
        while process.poll() is None:
            peak = peaks(process.pid) or peak
            time.sleep(0.05)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the command failed: {words}")
    seconds = time.perf_counter() - start
    summary = json.loads(text)
    return {
        "seconds": seconds,
        "merging": summary["seconds"]["merging"] / seconds,
        "peak_addresses": peak["addresses"],
        "peak_memory": peak["memory"],
        "summary": summary,
    }


def main() -> None:
    """Write the file, run every case, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a file of 0.1 GB")
    parser.add_argument(
        "--gigabytes", type=float, default=20.0, help="size of the file"
    )
    parser.add_argument("--folder", type=Path, help="where to write the file")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    gigabytes = 0.1 if arguments.quick else arguments.gigabytes
    report: dict[str, Any] = {"machine": cpu(), "limit": LIMIT, "rows": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path, output = Path(folder) / "tokens.npy", Path(folder) / "merged.npz"
        shape = write_tokens(path, gigabytes)
        size = path.stat().st_size
        report |= {"shape": shape, "bytes": size, "read_seconds": read_seconds(path)}
        print(f"qm_cupy compress, {size / 1e9:.2f} GB {shape}, limit {LIMIT / 1e9} GB")
        print(f"{'a plain read':<28}{report['read_seconds']:8.1f} s")
        for name, options in CASES.items():
            row = {"name": name, **compress(path, output, options)}
            report["rows"].append(row)
            print(
                f"{name:<28}{row['seconds']:8.1f} s  {row['merging']:6.1%} merging  "
                f"{row['peak_addresses'] / 1e9:.2f} GB of addresses, "
                f"{row['peak_memory'] / 1e9:.2f} GB of memory",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, report)


if __name__ == "__main__":
    main()
