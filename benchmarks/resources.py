"""What each kernel takes of a multiprocessor, on every architecture; needs no GPU.

    python benchmarks/resources.py [--arch 80 90] [--quick | --rehearse] [--json PATH]

Compiles with NVRTC (packages cuda-bindings, nvidia-cuda-nvrtc, nvidia-cuda-runtime) and
prints registers, spills, shared memory and theoretical occupancy. A file that does not
compile is an entry of "errors". Exits 1 on a spill or an error, 130 if interrupted.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests, qm_cupy

from guard import complete, guarded, leave, say
from report import write_json

from qm_cupy import _cuda
from tests.emulator.nvrtc import compile_log


class Limits(NamedTuple):
    """What a multiprocessor (SM) holds at once."""

    threads: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications
# per Compute Capability". The register file holds 65,536 on all of them.
LIMITS = {
    75: Limits(1024, 16, 64 << 10),
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
REGISTERS = 65_536
DTYPES = ("float16", "bfloat16", "float32", "float64")

_ENTRY = re.compile(
    r"Function properties for (?P<kernel>\w+)\n"
    r".*?(?P<spilled>\d+) bytes spill stores, (?P<reloaded>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?P<used>.*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")
_BOUNDS = re.compile(r"__launch_bounds__\((\w+).*?\)\s*(\w+)\(")


def blocks_per_sm(arch: int, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks fit, by the rules of CUDA's own cuda_occupancy.h."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    # Registers are given out per warp, 256 at a time, by four parts of the SM.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    # From sm_80 on the system takes 1 KB of each block; bytes go by the 128 (or 256).
    unit, system = (256, 0) if arch < 80 else (128, 1024)
    per_block = -(-(shared + system) // unit) * unit
    by_shared = limits.shared // per_block if per_block else limits.blocks
    by_threads = limits.threads // (warps * 32)
    return min(limits.blocks, by_registers, by_shared, by_threads)


def most_threads(source: str, dtype: str) -> dict[str, int]:
    """Return the threads of a block, at most, of the kernels that say so."""
    found = {}
    for name, kernel in _BOUNDS.findall(source):
        value = re.search(rf"constexpr int {name} = (.+?);", source)[1]
        if "?" in value:  # sizeof(acc_t) == 4 ? narrow : wide
            value = value.split("?")[1].split(":")[dtype == "float64"]
        found[kernel] = int(value)
    return found


def measure(job: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Compile a file for one dtype and architecture; return a row per kernel."""
    file, dtype, arch = job
    source = _cuda.source(file)
    largest = most_threads(source, dtype)
    log = compile_log(source, [*_cuda.options(dtype), f"-arch=sm_{arch}"])
    found = {match["kernel"]: match for match in _ENTRY.finditer(log)}
    rows = []
    for kernel in _cuda.kernel_names(file):
        match = found[kernel]
        registers = int(match["registers"])
        shared = int(next(iter(_SHARED.findall(match["used"])), 0))
        threads = largest.get(kernel, _cuda.BLOCK)
        blocks = blocks_per_sm(arch, threads, registers, shared)
        rows.append(
            {
                "arch": arch,
                "dtype": dtype,
                "kernel": f"{file}/{kernel}",
                "registers": registers,
                "spill_bytes": int(match["spilled"]) + int(match["reloaded"]),
                "shared_bytes": shared,
                "threads": threads,
                "blocks_per_sm": blocks,
                "occupancy": blocks * threads / LIMITS[arch].threads,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table per architecture and dtype."""
    before = None
    for row in rows:
        if before != (before := (row["arch"], row["dtype"])):
            print(f"\nsm_{row['arch']}, {row['dtype']}")
            print(
                f"{'kernel':<44}{'regs':>5}{'spill B':>9}{'shared B':>10}"
                f"{'threads':>9}{'blocks':>8}{'occup.':>8}"
            )
        print(
            f"{row['kernel']:<44}{row['registers']:>5}{row['spill_bytes']:>9}"
            f"{row['shared_bytes']:>10}{row['threads']:>9}{row['blocks_per_sm']:>8}"
            f"{row['occupancy']:>8.0%}"
        )


Job = tuple[str, str, int]  # a file, a dtype, an architecture


def jobs_of(options: Any) -> list[Job]:
    if options.rehearse:
        return [(_cuda.kernel_files()[0], "float32", 90)]
    dtypes = ("float16", "float32") if options.quick else DTYPES
    archs = options.arch or ((90,) if options.quick else tuple(LIMITS))
    files = _cuda.kernel_files()
    jobs = [(file, dtype, arch) for arch in archs for dtype in dtypes for file in files]
    tiled = [file for file in files if "multiply_tiles(" in _cuda.text(file)]
    return jobs + [(file, "tf32", arch) for arch in archs for file in tiled]


def compile_all(
    jobs: list[Job], report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the rows of all jobs, in their order, and the errors of those that fail."""
    done: dict[Job, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs))) as pool:
        futures = {pool.submit(measure, job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                file, dtype, arch = job
                with guarded(report["errors"], f"sm_{arch} {dtype} {file}"):
                    done[job] = future.result()
                report["kernels"] = [row for x in jobs for row in done.get(x, [])]
                if number % 16 == 0 or number == len(jobs):
                    say(f"[{number}/{len(jobs)}] compiled")
                    save()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def show_all(report: dict[str, Any]) -> None:
    rows = report["kernels"]
    show(rows)
    spilled = [row for row in rows if row["spill_bytes"]]
    print(f"\n{len(rows)} kernels compiled, {len(spilled)} spill")
    for row in spilled:
        print(
            f"    sm_{row['arch']} {row['dtype']} {row['kernel']}: {row['spill_bytes']}"
        )
    for job, error in report["errors"].items():
        print(f"    {job}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, metavar="CC")
    parser.add_argument("--quick", action="store_true", help="sm_90, two dtypes")
    parser.add_argument("--rehearse", action="store_true", help="one file")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
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
