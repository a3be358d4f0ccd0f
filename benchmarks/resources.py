"""Print the resources of each kernel on every architecture, without a GPU.

    python benchmarks/resources.py [--arch 80 90] [--quick | --rehearse] [--json PATH]
    python benchmarks/resources.py --counts [--before COMMIT] [--json PATH]

The script compiles the kernels with NVRTC (packages cuda-bindings, nvidia-cuda-nvrtc,
nvidia-cuda-runtime) and prints registers, spills, shared memory and theoretical
occupancy. A file that does not compile is an entry of "errors". The exit status is 1
after a spill or an error, and 130 if interrupted.

`--counts` also needs nvidia-cuda-nvdisasm. It prints the instructions of the kernels'
loops by unit, and the least time of each operation on an H200 (model.py). The JSON
holds these figures as "now". Beside them it holds "before", the figures of an earlier
commit, which `--before` writes. `--counts --json
benchmarks/results/instructions.json` refreshes the table.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # qm_cupy
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # cards.py

from card_device import facts_of
from cards import LIMITS, blocks_per_sm
from guard import complete, guarded, leave, say
from report import write_json
from seam import cuda

DTYPES = ("float16", "bfloat16", "float32", "float64")


def measure(job: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Compile a file for one dtype and architecture, and return a row per kernel."""
    file, dtype, arch = job
    facts_by_kernel, rows = facts_of(file, dtype, arch), []
    for kernel in cuda.kernel_names(file):
        facts = facts_by_kernel[kernel]
        # The launch bound that the kernel declares, or the usual block.
        threads = facts.bound or cuda.BLOCK
        blocks = blocks_per_sm(arch, threads, facts.registers, facts.shared)
        rows.append(
            {
                "arch": arch,
                "dtype": dtype,
                "kernel": f"{file}/{kernel}",
                "registers": facts.registers,
                "spill_bytes": facts.spilled,
                "shared_bytes": facts.shared,
                "threads": threads,
                "blocks_per_sm": blocks,
                "occupancy": blocks * threads / LIMITS[arch].threads,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each architecture and dtype."""
    before = None
    for row in rows:
        if before != (before := (row["arch"], row["dtype"])):
            print(f"\nsm_{row['arch']}, {row['dtype']}")
            print(
                f"{'kernel':<60}{'regs':>5}{'spill B':>9}{'shared B':>10}"
                f"{'threads':>9}{'blocks':>8}{'occup.':>8}"
            )
        print(
            f"{row['kernel']:<60}{row['registers']:>5}{row['spill_bytes']:>9}"
            f"{row['shared_bytes']:>10}{row['threads']:>9}{row['blocks_per_sm']:>8}"
            f"{row['occupancy']:>8.0%}"
        )


Job = tuple[str, str, int]  # a file, a dtype, an architecture


def jobs_of(options: Any) -> list[Job]:
    """Return the compilations that the options select."""
    if options.rehearse:
        return [(cuda.kernel_files()[0], "float32", 90)]
    dtypes = ("float16", "float32") if options.quick else DTYPES
    archs = options.arch or ((90,) if options.quick else tuple(LIMITS))
    files = cuda.kernel_files()
    jobs = [(file, dtype, arch) for arch in archs for dtype in dtypes for file in files]
    # TF32 is another compilation of the files with matrix products.
    tiled = [file for file in files if "multiply_tiles(" in cuda.text(file)]
    return jobs + [(file, "tf32", arch) for arch in archs for file in tiled]


def compile_all(
    jobs: list[Job], report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the rows of all jobs, in the order of `jobs`, and the errors."""
    done: dict[Job, list[dict[str, Any]]] = {}
    # Threads compile in parallel, because NVRTC releases Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {pool.submit(measure, job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                file, dtype, arch = job
                # One file that does not compile must not end the run.
                with guarded(report["errors"], f"sm_{arch} {dtype} {file}"):
                    done[job] = future.result()
                # Jobs finish in any order; the report keeps the order of `jobs`.
                report["kernels"] = [row for x in jobs for row in done.get(x, [])]
                if number % 16 == 0 or number == len(jobs):
                    say(f"[{number}/{len(jobs)}] compiled")
                    save()
        finally:
            # After an interrupt, do not compile the jobs that wait.
            pool.shutdown(wait=False, cancel_futures=True)


def show_all(report: dict[str, Any]) -> None:
    """Print the tables, the kernels that spill and the errors."""
    rows = report["kernels"]
    show(rows)
    spilled = [row for row in rows if row["spill_bytes"]]
    print(f"\n{len(rows)} kernels compiled, {len(spilled)} of them spill registers")
    for row in spilled:
        print(
            f"    sm_{row['arch']} {row['dtype']} {row['kernel']}: {row['spill_bytes']}"
        )
    for job, error in report["errors"].items():
        print(f"    {job}: {error}")


def count(options: Any) -> int:
    """Count instructions, and add them to the entries of the file."""
    # Imported here: only `--counts` needs nvdisasm.
    import instructions
    from launches import of_the_table

    report = instructions.new_report()
    path = options.json
    table = json.loads(path.read_text()) if path and path.exists() else {}
    # The other entry of the file stays as it is.
    if options.before:
        report = {"commit": options.before, **report}
    # The kernels of the last count, most of which this count needs again.
    earlier = table.get("now", {}).get("kernels", ())
    table["before" if options.before else "now"] = report

    def measure() -> None:
        instructions.compile_ahead(earlier)
        instructions.count_all(report, of_the_table(), save)

    def save() -> None:
        if path:
            write_json(path, table)

    return complete(
        measure,
        save,
        lambda: instructions.show(report),
        lambda: bool(report["errors"]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, metavar="CC")
    parser.add_argument("--quick", action="store_true", help="sm_90, two dtypes")
    parser.add_argument("--rehearse", action="store_true", help="one file")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--counts", action="store_true", help="count instructions")
    parser.add_argument("--before", metavar="COMMIT", help="write them as 'before'")
    options = parser.parse_args()
    if options.counts:
        return count(options)
    report: dict[str, Any] = {"kernels": [], "errors": {}}

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    return complete(
        lambda: compile_all(jobs_of(options), report, save),
        save,
        lambda: show_all(report),
        lambda: bool(
            report["errors"] or any(x["spill_bytes"] for x in report["kernels"])
        ),
    )


if __name__ == "__main__":
    leave(main())
