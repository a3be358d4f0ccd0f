"""The least time of a launch on an H200, from its machine code, and what bounds it.

A warp executes each loop as often as the sizes of the launch require
(kernel_models.py), and the rest of the kernel once. An instruction takes an issue slot
and time on its unit. The least time is that of the slowest resource: issue slots,
units, caches, memory, or chains of loads. Waits between dependent instructions are not
included.
"""

import math
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

from launches import H200, Launch  # isort: skip  first: it sets the path of tests/
import machine_code
import nvrtc
from card_device import facts_of
from cards import blocks_per_sm
from kernel_models import MODELS, Model, Sizes
from machine_code import Function, Path
from seam import cuda

CLOCK = 1.98e9  # Hz, the highest clock of an H200, which the measured one reported
# Rates of one multiprocessor, per clock. The lanes of each unit are those of the CUDA
# C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute
# capability 9.0.
SCHEDULERS = 4  # instructions issued, each for 32 lanes
LANES = {"mufu": 16, "fp32": 128, "imad": 64, "fp64": 64, "alu": 64, "shuffle": 32}
MMA = 16 * 8 * 16  # multiply-adds of an HMMA.16816
# Four tensor cores with 512 multiply-adds each. mma.sync reaches about 62 % of that on
# Hopper (arXiv:2402.13499); only wgmma reaches more.
MULTIPLY_ADDS = 0.62 * 4 * 512
SHARED_BYTES = 128  # between registers, shared memory and L1
PORT_BYTES = 64  # from L2 to one multiprocessor
# Rates of the whole GPU, per second. L2 is an estimate, memory was measured.
L2_BYTES = 5.5e12
MEMORY_BYTES = 4.28e12
FP32_FLOPS = 2 * LANES["fp32"] * H200.multiprocessors * CLOCK  # 2 per multiply-add
LAUNCH_SECONDS = 1.5e-6  # measured
ROUND_TRIP = 270  # clocks from a load until its data arrive from L2


class UnknownKernelError(LookupError):
    """A kernel that has no entry in MODELS."""


def text_of(file: str, dtype: str) -> str:
    """Return the machine code of a file for the H200, as text."""
    options = (*cuda.options(dtype), f"-arch=sm_{H200.arch}")
    return nvrtc.disassembly(cuda.source(file), options)


def function_of(file: str, kernel: str, dtype: str) -> Function:
    """Return a kernel's machine code for the H200."""
    return machine_code.parse(text_of(file, dtype), [kernel])[kernel]


def sizes_of(launch: Launch) -> Sizes:
    """Return the sizes of a launch, for the functions of kernel_models.py."""
    # An argument of the kernel cannot replace the launch's own blocks and threads.
    own = {"blocks": launch.blocks, "threads": launch.threads}
    return SimpleNamespace(**(launch.numbers | own))


class Part(NamedTuple):
    """A loop or the rest of a kernel, in one launch."""

    path: Path  # the instructions of one pass
    times: float  # passes of a warp
    scores: float  # scores that a thread finishes in a pass, or 0
    chain: float  # loads that wait for each other, over all passes


def parts_of(launch: Launch, model: Model, function: Function) -> dict[str, Part]:
    """Return the parts that a warp executes: the loops of the model, and the rest.

    A kernel whose time is not predicted has one part, all of its code.
    """
    if not model.predicted:
        return {"code": Part(function.code, 1.0, 0.0, 0.0)}
    if not model.loops:
        return {}
    sizes = sizes_of(launch)
    loops: dict[str, machine_code.Loop] = {}
    parts: dict[str, Part] = {}
    # Find the loops first: `around` and `inside` name loops that come earlier.
    for name, spec in model.loops.items():
        if spec.around:
            loops[name] = function.loop_around(loops[spec.around])
        else:
            outer_loop = loops.get(spec.inside)
            loops[name], _ = function.loop_through(spec.via, spec.work, outer_loop)
    for name, spec in model.loops.items():
        # Inner loops are parts of their own, so this path does not count them.
        within = [x for x in loops.values() if x.blocks < loops[name].blocks]
        path = function.path(loops[name], spec.via, within)
        work = spec.times(sizes)
        # With `work`, one pass may execute the opcode several times.
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
    """Return the least seconds of a launch by each resource."""
    blocks = math.ceil(launch.blocks / H200.multiprocessors)  # on the busiest SM
    warps = blocks * (model.warps or launch.threads / 32)
    counts: Counter[str] = Counter()  # instructions of a warp, by unit
    moved: Counter[str] = Counter()  # bytes of a lane, by unit
    chain = 0.0
    for name, part in parts.items():
        for unit, count in part.path.units.items():
            counts[unit] += part.times * count
        for unit, size in part.path.lane_bytes.items():
            if name == "rest" and unit == "ldgsts":
                # These copies of the first steps are not added: as many of the last
                # passes of the loop copy nothing.
                continue
            # Lanes of an LDS may read the same bytes. It takes at least one clock,
            # which is that of 4 bytes per lane.
            least = 4 * part.path.units[unit] if unit == "lds" else size
            moved[unit] += part.times * least
        chain += part.chain
    # Clocks per warp. A warp of 32 lanes occupies a unit for 32 / lanes clocks.
    per_warp = {"issue": sum(counts.values()) / SCHEDULERS}
    per_warp["tensor"] = counts["tensor"] * MMA / MULTIPLY_ADDS
    for unit, lanes in LANES.items():
        # An IMAD uses half of the lanes that multiply floats: it counts for both units.
        both = counts["imad"] if unit == "fp32" else 0
        per_warp[unit] = (counts[unit] + both) * 32 / lanes
    per_warp["shared"] = 32 * sum(moved.values()) / SHARED_BYTES
    seconds = {name: warps * clocks / CLOCK for name, clocks in per_warp.items()}
    # Copies read from L2, and stores write to it. Loads are left out: narrow loads may
    # come from L1.
    far = 32 * (moved["ldgsts"] + moved["stg"])
    port = blocks * (launch.threads / 32 * far + model.port_bytes(sizes_of(launch)))
    seconds["L2"] = launch.blocks * launch.threads / 32 * far / L2_BYTES
    seconds["L2 port"] = port / PORT_BYTES / CLOCK
    seconds["memory"] = launch.array_bytes / MEMORY_BYTES
    # Blocks that are resident together wait for their loads at the same time.
    turns = math.ceil(blocks / max(resident(launch), 1))
    seconds["chain"] = turns * chain * ROUND_TRIP / CLOCK
    return seconds


def resident(launch: Launch) -> int:
    """Return how many blocks of a launch fit a multiprocessor at the same time."""
    facts = facts_of(launch.file, launch.dtype, H200.arch)[launch.kernel]
    shared = facts.shared + launch.shared
    return blocks_per_sm(H200.arch, launch.threads, facts.registers, shared)


def model_of(launch: Launch) -> Model:
    """Return the model of a launch's kernel."""
    if launch.name not in MODELS:
        raise UnknownKernelError(
            f"{launch.name} is launched and has no model: add an entry to MODELS in "
            "benchmarks/kernel_models.py"
        )
    return MODELS[launch.name]
