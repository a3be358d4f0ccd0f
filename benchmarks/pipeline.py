"""Measure whole calls of `quickmerge` beside others: time, memory, and break-even.

    python benchmarks/pipeline.py [--quick | --rehearse] [--json PATH] [--plot PATH]
                                  [--width D] [--depth L] [--after LAYERS]
                                  [--seconds S] [--minutes M]

The tokens are 16 x 16 patches of a photograph (matplotlib's own) at random positions,
in raster order, minus their mean. N ranges from 196 to 16,384, and a quarter of the
tokens is left. The dtype is float32 on the CPU, and float16 on a GPU if there is one.
All contenders run in one process and take turns; times are medians. A contender is
skipped at a size where a call is expected to take longer than `--seconds`, judged by
the last size.

Then the script compares the time of merging with the time that it saves. The model is a
transformer of `--depth` pre-norm layers of this width (torch's, with its fused
attention), with a merge after layer `--after`. Layers to break even = time of merging /
(time of a layer for N tokens - time of a layer for N / 4 tokens).

Sizes run from the least work to the most, and the JSON is written after every size.
A contender that fails is an entry of its row. Exit status: 1 if one of ours failed;
4 if the process lost the GPU; 130 if interrupted.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

from guard import complete, free_memory, guarded, leave, one_line, say, time_limit
from machine import Machine
from pipeline_tables import (
    RATIO,
    growth,
    plot,
    print_break_even,
    print_calls,
    print_errors,
)
from report import median_seconds, write_json
from whole_calls import HEAD, OURS, contenders, layer, patches, sound, stages

import qm_cupy as qm

WEIGH_SECONDS = 60.0  # limit for measuring the memory or the launches of one call

Report = dict[str, Any]


class Measurements:
    """The rows of the report, which are measured one after the other."""

    def __init__(self, machine: Machine, options: Any, save: Callable[[], None]):
        self.machine = machine
        # A short run uses the width of one head.
        self.width = 64 if options.quick or options.rehearse else options.width
        self.seconds = options.seconds
        self.end = time.monotonic() + 60 * options.minutes
        self.once = options.rehearse
        self.save = save
        self.rows: list[Report] = []
        # B N² and seconds of the last size that was timed, by contender.
        self.last: dict[str, tuple[int, float]] = {}

    def repeats(self, batch: int, num_tokens: int) -> int:
        """Return how often a size is timed: less often for many tokens on a CPU."""
        if self.once:
            return 1
        if self.machine.gpu:
            return 9
        # 9 times up to B N = 1365, once from B N = 6145 on.
        return max(1, min(9, 12288 // (batch * num_tokens)))

    def calls(self, row: Report) -> dict[str, Callable[[], Any]]:
        """Return the calls of a row that are expected to finish in time."""
        batch, num_tokens = row["batch"], row["num_tokens"]
        host, num_groups = (
            patches(batch, num_tokens, self.width),
            num_tokens // RATIO,
        )
        result = {}
        for name, contender in contenders(self.machine).items():
            # The time is expected to grow like B N².
            work, taken = self.last.get(name, (1, 0.0))
            if taken * batch * num_tokens**2 / work > self.seconds:
                continue
            with guarded(row["errors"], name, title(row)):
                x = self.machine.put(host, name.startswith("torch"))
                result[name] = lambda x=x, f=contender: f(x, num_groups)
        return result

    def measure(self, batch: int, num_tokens: int) -> None:
        """Time every contender, every stage and a layer at one size."""
        row: Report = {"batch": batch, "num_tokens": num_tokens}
        row |= {"contenders": {}, "stages": {}, "errors": {}}
        self.rows.append(row)
        calls = self.calls(row)
        # The shape of the merged tokens, (B, N / 4, D).
        shape = (batch, num_tokens // RATIO, self.width)
        for name, call in calls.items():
            with guarded(row["errors"], name, title(row)):
                self.warm_up(name, call, shape)
        medians = median_seconds(
            {name: self.machine.waited(call) for name, call in calls.items()},
            self.repeats(batch, num_tokens),
            row["errors"],
            title(row),
        )
        for name, taken in medians.items():
            self.last[name] = batch * num_tokens**2, taken
            unknown = {"launches": None, "peak_bytes": None}  # measured after all times
            row["contenders"][name] = {"seconds": taken, **unknown}
        self.save()  # the stages and the layer can still fail
        self.measure_stages(row)
        if self.machine.torch is not None:
            self.measure_layer(row)
        self.save()

    def warm_up(self, name: str, call: Callable[[], Any], shape: Any) -> None:
        """Run a contender once before it is timed.

        Ours run at every size, and their results are checked; others run once in all.
        """
        if name in OURS:
            result = call()
            if not sound(result, shape):
                raise ValueError("wrong result: the tokens are not means of the inputs")
        elif name not in self.last:
            call()
        self.machine.waited(lambda: None)()  # an error of this contender belongs to it

    def measure_stages(self, row: Report) -> None:
        """Add the seconds of each of the paper's stages."""
        batch, num_tokens = row["batch"], row["num_tokens"]
        with guarded(row["errors"], "stages", title(row)):
            x = self.machine.put(patches(batch, num_tokens, self.width), False)
            parts = stages(x, num_tokens // RATIO).items()
            waited = {name: self.machine.waited(stage) for name, stage in parts}
            row["stages"] = median_seconds(waited, self.repeats(batch, num_tokens))

    def measure_layer(self, row: Report) -> None:
        """Add the seconds of a layer for N tokens and for K tokens."""
        batch, num_tokens = row["batch"], row["num_tokens"]
        machine, torch = self.machine, self.machine.torch
        with guarded(row["errors"], "layer", title(row)), torch.no_grad():
            run = layer(machine, self.width)
            x = machine.put(patches(batch, num_tokens, self.width), for_torch=True)
            # The first K tokens stand for the merged ones.
            few = x[:, : num_tokens // RATIO].contiguous()
            calls = {
                "unmerged": machine.waited(lambda: run(x)),
                "merged": machine.waited(lambda: run(few)),
            }
            for call in calls.values():
                call()
            # At least three timings: the break-even uses the difference of two times.
            repeats = self.repeats(batch, num_tokens)
            row["layer"] = median_seconds(
                calls, repeats if self.once else max(3, repeats)
            )

    def weigh(self, field: str, of_call: Callable[[Any], int | None]) -> None:
        """Add the memory or the launches of every contender to the rows.

        This comes after all times, because the first profile takes seconds and may
        fail. The first failure ends it.
        """
        errors: dict[str, str] = {}
        for row in self.rows:
            if time.monotonic() > self.end or errors:
                break
            say(f"{field}: {title(row)}")
            free_memory()
            # An error here would repeat one that the row already has.
            calls = self.calls({**row, "errors": {}})
            # Only contenders with a time are weighed; others have no entry.
            for name, figures in row["contenders"].items():
                if name in calls and not errors:
                    call = self.machine.waited(calls[name])
                    with guarded(errors, field, title(row)), time_limit(WEIGH_SECONDS):
                        figures[field] = of_call(call)
            row["errors"] |= errors
            self.save()

    def run(self, sizes: list[tuple[int, int]]) -> None:
        """Measure all sizes until the time is up, then memory and launches."""
        for number, (batch, num_tokens) in enumerate(sizes, 1):
            if time.monotonic() > self.end:
                say(f"out of time: {len(sizes) - number + 1} sizes skipped")
                break
            say(f"[{number}/{len(sizes)}] B={batch} N={num_tokens}")
            free_memory()
            self.measure(batch, num_tokens)
        self.weigh("peak_bytes", self.machine.peak_bytes)
        if self.machine.gpu and self.machine.torch is not None:
            self.weigh("launches", self.machine.launches)


def title(row: Report) -> str:
    return f"B={row['batch']} N={row['num_tokens']}"


def sizes_of(options: Any) -> list[tuple[int, int]]:
    """Return the sizes (B, N), in the order of their work B N²."""
    if options.rehearse:
        return [(1, 64)]
    if options.quick:
        return [(1, 64), (2, 64), (1, 128)]
    sizes = [(1, n) for n in (196, 576, 1024, 4096, 16384)]
    sizes += [(8, n) for n in (196, 1024, 4096)]
    # If time runs out, the sizes that cost most are missing.
    return sorted(sizes, key=lambda size: size[0] * size[1] ** 2)


def show(report: Report, names: list[str], layers: int, path: Path | None) -> None:
    """Print the tables, and draw the figures if there is a path for them."""
    rows = sorted(report["rows"], key=lambda row: (row["batch"], row["num_tokens"]))
    print_calls(rows, names)
    if any("layer" in row for row in rows):
        report["break_even"] = print_break_even(rows, names, layers)
    else:
        print("the break-even needs torch, which times the layers")
    print_errors(rows)
    if path and rows:
        try:
            plot({**report, "rows": rows}, path)
        except Exception as error:  # the figures are on disk already
            say(f"the plot failed: {one_line(error)}")


def ours_failed(rows: list[Report]) -> bool:
    """Return whether one of our contenders, or a stage, failed."""
    blamed = {*OURS, "stages"}  # an error of another library is not ours
    return any(blamed & row["errors"].keys() for row in rows)


def parsed() -> argparse.Namespace:
    """Return the options of the command line, after checking them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--rehearse", action="store_true", help="try all steps, tiny")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG")
    parser.add_argument("--width", type=int, default=768, help="D, at most 768")
    parser.add_argument("--depth", type=int, default=12, help="layers of the model")
    parser.add_argument("--after", type=int, default=3, help="layers before the merge")
    parser.add_argument("--seconds", type=float, default=30, help="limit of one call")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    options = parser.parse_args()
    if not HEAD <= options.width <= 768 or options.width % HEAD:
        parser.error(
            f"--width must be a multiple of {HEAD} up to 768, got {options.width}"
        )
    if not 0 <= options.after < options.depth:
        parser.error(f"--after must be in [0, {options.depth}), got {options.after}")
    return options


def main() -> int:
    options = parsed()
    machine = Machine()
    # Layers after the merge: only they save time.
    names, layers = list(contenders(machine)), options.depth - options.after
    report: Report = {"machine": machine.name, "gpu": machine.card}

    def save() -> None:
        # `measurements` is set below; `save` runs only after that.
        report["growth"] = {name: growth(measurements.rows, name) for name in names}
        if options.json:
            write_json(options.json, report)

    measurements = Measurements(machine, options, save)
    report |= {"width": measurements.width, "rows": measurements.rows, "layers": layers}
    print(
        f"qm_cupy {qm.__version__}, {machine.name}; "
        f"D = {measurements.width}, K = N / {RATIO}"
    )

    def finish() -> None:
        show(report, names, layers, options.plot)
        save()  # again: `show` adds the break-even

    return complete(
        lambda: measurements.run(sizes_of(options)),
        save,
        finish,
        lambda: ours_failed(measurements.rows),
    )


if __name__ == "__main__":
    leave(main())
