"""Every launch of the public functions is within the limits of real GPUs.

No kernel is executed. `cards` has the limits and the facts of the compiled kernels, and
`card_device` puts these cards in place of the GPU. The checks themselves are tested in
test_cards.py.
"""

import itertools
import re

import card_device
import device_array
import ml_dtypes
import numpy as np
import pytest
from cards import CARDS
from launch_calls import OPERATIONS, Case
from seam import cuda

import qm_cupy as qm

# Around every threshold of the launchers: warps, blocks, tiles, shared memory.
SIZES = (
    1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600, 932, 933, 1023,
    1024, 1025, 1100, 1523, 1524, 1600, 2049, 4096, 4200, 5000,
)  # fmt: skip
SHAPES = [  # N, D, B
    *((n, 3, 3) for n in SIZES),
    *((n, 3, 1) for n in SIZES[::2]),
    *((n, 3, 150) for n in (1, 33, 257, 1600, 5000)),  # more than any card has SMs
    *((33, d, 1) for d in (1, 64, 72, 1000)),
    (1025, 72, 1),
    (1025, 8192, 1),
    (5000, 1000, 1),
]
VARIANTS = [
    *itertools.product(
        ("basic", "optimized"), ("float16", "bfloat16", "float32", "float64")
    ),
    ("optimized", "tf32"),
]
# Public functions and classes that launch no kernel themselves.
LAUNCH_NOTHING = {
    "allow_tf32", "check_finite", "use_kernels", "warmup",  # settings
    "gumbel_noise", "token_budget",  # computed on the host
    "Workspace",  # memory
    # These call other public functions, which launch.
    "BidirectionalARAlignment", "DifferentiableTokenMerging", "EntropyAwareSaliency",
    "NormBasedFidelityConstraint", "QuickMergePP", "quickmerge_inference",
}  # fmt: skip
# Calls in which the host reads values that a GPU has computed, and must wait for it.
READS = {
    "alignment_loss, Merged": ["to_host"],  # K of each sequence, from its sizes
    "evict": ["to_host"],  # the numbers of entries that must remain
    "KVStream": ["to_host"],  # as merge_kv_cache
    "match_attention": ["to_host"],  # the fit runs on the host
    "merge_kv_cache": ["to_host"],  # the heights of the merges
    "choose_merge": ["to_host"],  # K of each sequence, for every candidate
    "MLPPrior.fit": ["to_host", "x[mask]", "__float__"],  # rows that are not padding
}


def numpy_dtype(name):
    known = {"bfloat16": ml_dtypes.bfloat16, "tf32": np.float32}
    return np.dtype(known.get(name, name))


@pytest.mark.slow("compiles kernels, and calls all there is at sixty sizes")
@pytest.mark.machine_code
@pytest.mark.parametrize(("kernels", "dtype"), VARIANTS)
def test_every_launch_is_within_every_card(kernels, dtype, monkeypatch):
    # sm_89 has the instructions of sm_80, so it is checked in one dtype only.
    cards = [card for card in CARDS if card.arch != 89 or dtype == "float16"]
    card_device.compile_kernels(dtype, cards)
    device = card_device.install(monkeypatch, *cards)
    with qm.use_kernels(kernels), qm.allow_tf32(dtype == "tf32"):
        for shape in SHAPES:
            case = Case(*shape, dtype=numpy_dtype(dtype))
            for operation, call in OPERATIONS.items():
                device.run((operation, shape), call, case)
    if device.faults:
        pytest.fail(f"launches that a card refuses:\n{listed(device.faults)}")
    # Every kernel of this folder and dtype was launched at least once.
    wanted = {
        f"{file}/{kernel}"
        for file in cuda.kernel_files()
        for kernel in cuda.kernel_names(file)
        if file.startswith(kernels) and runs_in(kernel, dtype)
    }
    assert wanted - set(device.launches) == set()


def runs_in(kernel, dtype):
    """Return whether a kernel is launched for this dtype; see qm_cupy/cuda/tiles.py."""
    if kernel.endswith("_wide"):  # these multiply on tensor cores
        return dtype in ("float16", "bfloat16", "tf32")
    return not (kernel.endswith("_kept") and dtype == "float64")


def listed(faults):
    """Return a line for each kernel, card and limit, with the calls that exceed it."""
    calls, wanted = {}, {}
    for message, calls_of_fault in faults.items():
        # Messages that differ only in the number wanted become one line.
        number = max(map(int, re.findall(r"wanted (\d+)", message)), default=0)
        fault = re.sub(r"wanted \d+", "wanted up to {}", message)
        calls.setdefault(fault, []).extend(calls_of_fault)
        wanted[fault] = max(wanted.get(fault, 0), number)
    lines = []
    for fault, calls_of_fault in calls.items():
        operations = sorted({operation for operation, _ in calls_of_fault})
        sizes = ", ".join(map(str, sorted({shape[0] for _, shape in calls_of_fault})))
        more = "" if len(operations) < 4 else f" and {len(operations) - 3} more"
        lines.append(
            f"{fault.format(wanted[fault])}; N = {sizes}; first (N, D, B) = "
            f"{calls_of_fault[0][1]}; by {'; '.join(operations[:3])}{more}"
        )
    return "\n".join(lines)


def test_every_public_function_is_launched():
    # "cluster_tokens ward, mask" and "MLPPrior.fit" start with the public name.
    called = {re.split(r"[ .,]", name)[0] for name in OPERATIONS}
    results = {  # named tuples and protocols
        "AlignmentLoss", "Choice", "KVCache", "KernelCompilationError", "MLP",
        "Merged", "ModelState", "Prior", "SteppingPrior",
    }  # fmt: skip
    public = {name for name in qm.__all__ if callable(getattr(qm, name))}
    assert public - LAUNCH_NOTHING - results == called


@pytest.mark.slow("compiles kernels")
@pytest.mark.machine_code
@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_the_host_reads_nothing_else(kernels, monkeypatch):
    card_device.compile_kernels("float32", CARDS[-1:])
    device = card_device.install(monkeypatch, CARDS[-1])
    case, actual = Case(33), {}
    # A read makes the host wait for the stream, so each one must be known.
    with qm.use_kernels(kernels):
        for operation, call in OPERATIONS.items():
            device.run(operation, call, case)  # the first call copies weights of priors
            device_array.READS.clear()
            device.run(operation, call, case)
            if device_array.READS:
                actual[operation] = list(dict.fromkeys(device_array.READS))
    assert {name: sorted(reads) for name, reads in actual.items()} == {
        name: sorted(reads) for name, reads in READS.items()
    }
