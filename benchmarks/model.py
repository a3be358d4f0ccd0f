"""The least time of a launch on an H200, from its machine code, and what binds it.

A warp executes each loop as often as the launch's sizes say (kernel_models.py), and the
rest of the kernel once. An instruction takes an issue slot and the time of its unit.
The least time is that of the slowest: issue slots, units, caches, memory, or chains of
loads. Waits between dependent instructions are not in it.
"""

import math
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

from launches import H200, Launch  # isort: skip  which finds qm_cupy and tests/
import machine_code
import nvrtc
from card_device import facts_of
from cards import blocks_per_sm
from kernel_models import MODELS, Model, Sizes
from machine_code import Function, Path
from seam import cuda

CLOCK = 1.98e9  # Hz, the highest of an H200 and the one it reported
# What one multiprocessor does in a clock. Lanes of each unit: CUDA C++ Programming
# Guide, "Throughput of Native Arithmetic Instructions", compute capability 9.0.
SCHEDULERS = 4  # instructions issued, each for 32 lanes
LANES = {"mufu": 16, "fp32": 128, "imad": 64, "fp64": 64, "alu": 64, "shuffle": 32}
MMA = 16 * 8 * 16  # multiply-adds of an HMMA.16816
# Of four tensor cores, 512 each. mma.sync reaches about 62 % of that on Hopper
# (arXiv:2402.13499); only wgmma reaches more.
MULTIPLY_ADDS = 0.62 * 4 * 512
SHARED_BYTES = 128  # between registers, shared memory and L1
PORT_BYTES = 64  # from L2 to one multiprocessor
# What the whole GPU does in a second. L2 is an estimate, memory was measured.
L2_BYTES = 5.5e12
MEMORY_BYTES = 4.28e12
FP32_FLOPS = 2 * LANES["fp32"] * H200.multiprocessors * CLOCK
LAUNCH_SECONDS = 1.5e-6  # measured
ROUND_TRIP = 270  # clocks from a load to its data in L2


class UnknownKernelError(LookupError):
    """A kernel that MODELS does not name."""


def text_of(file: str, dtype: str) -> str:
    """Return the machine code of a file for the H200."""
    options = (*cuda.options(dtype), f"-arch=sm_{H200.arch}")
    return nvrtc.disassembly(cuda.source(file), options)


def function_of(file: str, kernel: str, dtype: str) -> Function:
    """Return a kernel's machine code for the H200."""
    return machine_code.parse(text_of(file, dtype), [kernel])[kernel]


def sizes_of(launch: Launch) -> Sizes:
    """Return a launch's sizes as the functions of kernel_models.py take them."""
    own = {"blocks": launch.blocks, "threads": launch.threads}  # and no argument's
    return SimpleNamespace(**(launch.numbers | own))


class Part(NamedTuple):
    """A loop or the rest of a kernel, in one launch."""

    path: Path
    times: float  # that a warp runs it
    scores: float  # that a thread finishes each time, or 0
    chain: float  # loads that wait for each other, in all


def parts_of(launch: Launch, model: Model, function: Function) -> dict[str, Part]:
    """Return what a warp of a launch executes: the model's loops and the rest.

    Of a kernel whose time is not predicted, it is all of its code.
    """
    if not model.predicted:
        return {"code": Part(function.code, 1.0, 0.0, 0.0)}
    if not model.loops:
        return {}
    sizes = sizes_of(launch)
    loops: dict[str, machine_code.Loop] = {}
    parts: dict[str, Part] = {}
    for name, spec in model.loops.items():
        if spec.around:
            loops[name] = function.loop_around(loops[spec.around])
        else:
            outer_loop = loops.get(spec.inside)
            loops[name], _ = function.loop_through(spec.via, spec.work, outer_loop)
    for name, spec in model.loops.items():
        within = [x for x in loops.values() if x.blocks < loops[name].blocks]
        path = function.path(loops[name], spec.via, within)
        work = spec.times(sizes)
        times = work / path.count(spec.work) if spec.work else work
        scores = spec.scores(sizes) if spec.scores else 0.0
        parts[name] = Part(path, times, scores, work * spec.chain)
    outer = [
        x
        for x in loops.values()
        if not any(x.blocks < y.blocks for y in loops.values())
    ]
    scores = model.scores(sizes) if model.scores else 0.0
    parts["rest"] = Part(function.path(None, model.rest, outer), 1.0, scores, 0)
    return parts


def bounds(launch: Launch, model: Model, parts: dict[str, Part]) -> dict[str, float]:
    """Return the least seconds of a launch by each bound."""
    blocks = math.ceil(launch.blocks / H200.multiprocessors)  # of the busiest SM
    warps = blocks * (model.warps or launch.threads / 32)
    counts: Counter[str] = Counter()  # of a warp, by unit
    moved: Counter[str] = Counter()  # bytes of a lane, by unit
    chain = 0.0
    for name, part in parts.items():
        for unit, count in part.path.units.items():
            counts[unit] += part.times * count
        for unit, size in part.path.lane_bytes.items():
            if name == "rest" and unit == "ldgsts":
                continue  # the first steps: as many of the last passes copy nothing
            # Of LDS, lanes may read the same bytes: a clock each, at least.
            least = 4 * part.path.units[unit] if unit == "lds" else size
            moved[unit] += part.times * least
        chain += part.chain
    per_warp = {"issue": sum(counts.values()) / SCHEDULERS}
    per_warp["tensor"] = counts["tensor"] * MMA / MULTIPLY_ADDS
    for unit, lanes in LANES.items():
        # An IMAD takes half of the lanes that multiply floats.
        both = counts["imad"] if unit == "fp32" else 0
        per_warp[unit] = (counts[unit] + both) * 32 / lanes
    per_warp["shared"] = 32 * sum(moved.values()) / SHARED_BYTES
    seconds = {name: warps * clocks / CLOCK for name, clocks in per_warp.items()}
    # Copies and stores come from L2, or go there; narrow loads may come from L1.
    far = 32 * (moved["ldgsts"] + moved["stg"])
    port = blocks * (launch.threads / 32 * far + model.port_bytes(sizes_of(launch)))
    seconds["L2"] = launch.blocks * launch.threads / 32 * far / L2_BYTES
    seconds["L2 port"] = port / PORT_BYTES / CLOCK
    seconds["memory"] = launch.array_bytes / MEMORY_BYTES
    turns = math.ceil(blocks / max(resident(launch), 1))
    seconds["chain"] = turns * chain * ROUND_TRIP / CLOCK
    return seconds


def resident(launch: Launch) -> int:
    """Return how many blocks of a launch a multiprocessor holds at once."""
    facts = facts_of(launch.file, launch.dtype, H200.arch)[launch.kernel]
    shared = facts.shared + launch.shared
    return blocks_per_sm(H200.arch, launch.threads, facts.registers, shared)


def model_of(launch: Launch) -> Model:
    """Return a launch's line of MODELS."""
    if launch.name not in MODELS:
        raise UnknownKernelError(
            f"{launch.name} is launched and has no model: add a line to MODELS in "
            "benchmarks/kernel_models.py"
        )
    return MODELS[launch.name]
