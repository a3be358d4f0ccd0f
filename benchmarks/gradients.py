"""Time forward and backward of each operation, beside torch's autograd.

    python benchmarks/gradients.py [--quick | --rehearse] [--json PATH] [--minutes M]
                                   [--no-compile]

Our functions are compared with the plain formula in torch, both eager and compiled.
Before the timing, gradients are checked against those of the plain formula in float32.
All contenders run in one process and take turns; times are medians. The inputs are
bfloat16 on a GPU if there is one, otherwise float32 on the CPU. Clustering occurs only
in the case of the whole, where all contenders make the same call.

Then the script measures the memory that forward and backward of the self-attention
entropy hold above their input, for several N. Ours should grow like N, that of autograd
like N squared.

Small sizes come first, torch.compile comes last (with the largest size first), and the
JSON is written after every row. A contender that fails is an entry of its row. Exit
status: 1 if one of our functions failed or was wrong; 3 without torch; 4 if the process
lost the GPU; 130 if interrupted.
"""

import argparse
import ctypes
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

from gradient_cases import (
    CASES,
    HALF_TOLERANCE,
    TOLERANCE,
    Case,
    Inputs,
    Loss,
    self_attention,
)
from guard import complete, free_memory, guarded, leave, say, time_limit
from machine import Machine, torch_on_gpu, torch_or_none
from report import median_seconds, write_json

import qm_cupy as qm

torch = torch_or_none()

COMPILE_SECONDS = 60.0  # limit for one torch.compile and its timing
EAGER = "qm_cupy", "torch"
COMPILED = "torch.compile"

Report = dict[str, Any]


# ------------------------------------------------------------------ measurements


def gradients(function: Loss, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the gradients for an upstream gradient that differs by element."""
    result = function(*inputs)
    # Start at 1: with an upstream gradient of 0, every gradient of a scalar would pass.
    slope = torch.linspace(1, 2, result.numel(), device=result.device)
    slope = slope.reshape(result.shape).to(result.dtype)
    return torch.autograd.grad(result, inputs, slope)


def half(tensors: tuple[Any, ...]) -> bool:
    """Return whether any tensor has a dtype of 16 bits."""
    return any(x.element_size() == 2 for x in tensors)


def difference(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> str:
    """Return a message if gradients differ by more than is allowed, else ""."""
    # An error is relative to the largest element of its gradient. The dtype of the
    # gradients decides what is allowed.
    tolerance = HALF_TOLERANCE if half(got) else TOLERANCE
    for x, y in zip(got, wanted, strict=True):
        near = tolerance * float(y.abs().max())
        gap = float((x.float() - y.float()).abs().max())
        if not gap <= near:  # true for NaN as well
            return f"the largest error is {gap:g}, allowed is {near:g}"
    return ""


def in_float32(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs of 16 bits in float32, and the others (weights) unchanged."""
    return tuple(
        x.detach().float().requires_grad_() if x.element_size() == 2 else x
        for x in inputs
    )


def measure(
    machine: Machine, case: Case, row: Report, names: tuple[str, ...], repeats: int
) -> None:
    """Check gradients, then add to `row` the medians of forward and of both passes."""
    errors, during = row["errors"], row["title"]
    forms = {"qm_cupy": case.ours, "torch": case.plain}
    if COMPILED in names:
        forms[COMPILED] = torch.compile(case.plain)
    wanted, calls = None, {}
    with guarded(errors, "reference", during):
        # The reference is in float32: in 16 bits the plain formula can be less exact
        # than ours.
        exact = case.inputs if not half(case.inputs) else in_float32(case.inputs)
        wanted = gradients(case.plain, exact)
        del exact
    for name in names:
        form = forms[name]
        with guarded(errors, name, during):
            actual = gradients(form, case.inputs)
            if wanted is not None and (why := difference(actual, wanted)):
                row["wrong"][name] = why
            del actual  # frees its memory before the timing
        # torch is timed even if its gradients are wrong; ours are not.
        if name not in errors and (name != "qm_cupy" or name not in row["wrong"]):
            # Detached inputs record no graph, so this is the time of forward alone.
            calls[f"{name}, forward"] = machine.waited(
                lambda form=form: form(*(x.detach() for x in case.inputs))
            )
            calls[name] = machine.waited(lambda form=form: gradients(form, case.inputs))
    del wanted
    # Warm up: torch.compile compiles forward alone here.
    median_seconds(calls, 1, errors, during)
    row["seconds"] |= median_seconds(calls, repeats, errors, during)


class Measurements:
    """The rows of the report, which are measured one after the other."""

    def __init__(self, machine: Machine, options: Any, save: Callable[[], None]):
        self.machine, self.save = machine, save
        self.end = time.monotonic() + 60 * options.minutes
        self.repeats = 1 if options.rehearse else 3 if options.quick else 9
        # `main` puts these two lists into the report, so that `save` writes them.
        self.rows: list[Report] = []
        self.memory: list[Report] = []

    def left(self) -> float:
        """Return the seconds that remain."""
        return self.end - time.monotonic()

    def measure_size(
        self, size: tuple[int, int, int], names: tuple[str, ...], limit: float
    ) -> None:
        """Measure all operations of a size with the contenders `names`."""
        inputs = Inputs(self.machine, *size)
        # The inputs are ours to make, so an error there is an error of ours. Once they
        # are known to work, an error belongs to the only contender.
        blamed = "inputs" if "qm_cupy" in names else names[0]
        for operation, make in CASES.items():
            if self.left() <= 0:
                say(f"out of time before {operation} of {size}")
                return
            row = self.row(size, operation)
            say(f"{', '.join(names)}: {row['title']}")
            seconds = min(limit, max(self.left(), 1))
            with guarded(row["errors"], blamed, row["title"]), time_limit(seconds):
                if COMPILED in names:
                    # Forget the compilations of the rows before.
                    torch.compiler.reset()
                measure(self.machine, make(inputs), row, names, self.repeats)
            free_memory()
            self.save()

    def row(self, size: tuple[int, int, int], operation: str) -> Report:
        """Return the row of an operation at a size, and create it if necessary."""
        title = f"{operation}, B, N, D = {size}"
        for row in self.rows:
            if row["title"] == title:
                return row
        row = {"title": title, "operation": operation, "size": size}
        row |= {"seconds": {}, "wrong": {}, "errors": {}}
        self.rows.append(row)
        return row

    def measure_memory(self, sizes: list[int], dim: int) -> None:
        """Add the peak bytes of forward and backward above the tokens (1, N, D)."""
        forms = {"qm_cupy": qm.self_attention_entropy, "torch": self_attention}
        for num_tokens in sizes:
            if self.left() <= 0:
                say(f"out of time before the memory at N = {num_tokens}")
                return
            say(f"memory: N = {num_tokens}")
            row: Report = {"num_tokens": num_tokens, "errors": {}}
            self.memory.append(row)
            for name, form in forms.items():
                row[name] = None  # stays if the measurement fails
                with guarded(row["errors"], name, f"memory, N = {num_tokens}"):
                    x = Inputs(self.machine, 1, num_tokens, dim).x
                    call = self.machine.waited(
                        lambda form=form, x=x: gradients(form, (x,))
                    )
                    call()  # warm up
                    give_back_memory()
                    row[name] = self.machine.peak_bytes(call)
            self.save()

    def run(self, sizes: list[Any], tokens: list[int], compiled: bool) -> None:
        for size in sizes:
            self.measure_size(size, EAGER, math.inf)
        self.measure_memory(tokens, sizes[-1][-1])
        for size in reversed(sizes) if compiled else ():
            self.measure_size(size, (COMPILED,), COMPILE_SECONDS)

    def failed(self) -> bool:
        rows = [row["errors"] | row.get("wrong", {}) for row in self.rows + self.memory]
        ours = {"inputs", "reference", "qm_cupy", "qm_cupy, forward"}
        return any(ours & row.keys() for row in rows)


def give_back_memory() -> None:
    """Make glibc return its free memory to the system.

    Otherwise a call could reuse that memory, and the resident set would not grow.
    """
    # Other C libraries do not have this function.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def exponent(rows: list[Report], name: str) -> float:
    """Return the p of growth like N ** p, fitted to the upper half of the sizes."""
    # Fixed costs hide the growth at small sizes. The slope of the logarithms is p.
    upper = rows[len(rows) // 2 - 1 :]
    # At least one byte, since log(0) is infinite.
    points = np.log([(row["num_tokens"], max(row[name], 1)) for row in upper])
    return float(np.polyfit(*points.T, 1)[0])


# ------------------------------------------------------------------------- tables


def print_times(rows: list[Report]) -> None:
    """Print forward, forward and backward, and their ratio, a block for each size."""
    previous = None
    for row in rows:
        if previous != (previous := tuple(row["size"])):
            print(f"\nB, N, D = {previous}, K = N / 4")
            print(f"{'milliseconds':<34}{'forward':>10}{'both':>10}{'ratio':>8}")
        print(row["operation"])
        for name, both in row["seconds"].items():
            forward = row["seconds"].get(f"{name}, forward")
            if forward:
                times = f"{1e3 * forward:>10.3g}{1e3 * both:>10.3g}"
                print(f"    {name:<30}{times}{both / forward:>7.1f}×")
        for field in ("wrong", "errors"):
            for name, why in row[field].items():
                print(f"    {name}{' is wrong' * (field == 'wrong')}: {why}")


def print_memory(rows: list[Report]) -> None:
    """Print the peak memory by N, and the exponent of its growth."""
    heads = "".join(f"{row['num_tokens']:>9}" for row in rows)
    print(f"\n{'MB of self-attention entropy, by N':<34}{heads}   growth")
    for name in EAGER:
        known = [row for row in rows if row.get(name) is not None]
        values = [row.get(name) for row in rows]
        cells = ["-" if x is None else f"{x / 1e6:.1f}" for x in values]
        last = f"   N^{exponent(known, name):.2f}" if len(known) > 1 else ""
        print(f"    {name:<30}{''.join(f'{x:>9}' for x in cells)}{last}")
    for row in rows:
        for name, why in row["errors"].items():
            print(f"    N = {row['num_tokens']}, {name}: {why}")


def sizes_of(options: Any, gpu: bool) -> tuple[list[Any], list[int]]:
    """Return (B, N, D) for the times and N for the memory, small sizes first."""
    if options.rehearse:
        return [(1, 64, 32)], [64, 128]
    if options.quick:
        return [(2, 512 if gpu else 128, 64)], [512, 1024, 2048, 4096]
    largest = [(8, 1024, 512), (8, 4096, 1024)] if gpu else [(4, 1024, 512)]
    return [(2, 128, 64), *largest], [1024, 2048, 4096, 8192]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--rehearse", action="store_true", help="try all steps, tiny")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    options = parser.parse_args()
    if torch is None:
        print("torch is not installed")
        return 3
    # torch's own warnings: a faster setting for float32, and deprecations.
    warnings.filterwarnings("ignore", module=r"torch\.")
    machine = Machine(on_cpu=torch_on_gpu() is None)
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}, {machine.name}")
    sizes, tokens = sizes_of(options, machine.gpu)
    report: Report = {"machine": machine.name, "gpu": machine.card}

    def save() -> None:
        if options.json:
            write_json(options.json, report)

    measurements = Measurements(machine, options, save)
    report |= {"rows": measurements.rows, "memory": measurements.memory}

    def show() -> None:
        print_times(measurements.rows)
        print_memory(measurements.memory)

    return complete(
        lambda: measurements.run(sizes, tokens, not options.no_compile),
        save,
        show,
        measurements.failed,
    )


if __name__ == "__main__":
    leave(main())
