"""Record the launches of an operation on an H200, without a GPU.

The public functions run on stand-ins for arrays (tests/device_array.py), so the
launches are those of a user's call. The sizes are those of kernels.py.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # qm_cupy
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # cards

import card_device
import device_array
from cards import Card
from recorded import Recorded, recording
from seam import cuda
from workload import Work, cosine_work, operations

import qm_cupy as qm
from qm_cupy.stages.selection.saliency_gumbel_mass import saliency_gumbel_mass_cuda

# sm_90, 132 multiprocessors, bytes of shared memory of a block, bytes of memory.
H200 = Card("H200", 90, 132, 227 << 10, 139 << 30)
MAX_ATTENTION_BYTES = 12e9  # limit for attention that is an input, as in kernels.py


class Launch(NamedTuple):
    """One launch: its kernel, its size and its arguments, except the arrays."""

    file: str
    kernel: str
    dtype: str
    blocks: int
    threads: int  # per block
    shared: int  # bytes of dynamic shared memory
    numbers: dict[str, float]  # scalar arguments by name
    array_bytes: int  # total size of the array arguments

    @property
    def name(self) -> str:
        return f"{self.file}/{self.kernel}"


class Operation(NamedTuple):
    """An operation of the table: its least work and its call."""

    title: str
    work: Work
    call: Callable[[], Any]
    fp32: bool = False  # whether it multiplies in float32


def array(*shape: int, dtype: Any = None) -> Any:
    """Return a stand-in for a user's array, in bfloat16 if no dtype is given."""
    import ml_dtypes

    x = device_array.empty(shape, dtype or ml_dtypes.bfloat16)
    return x.view(np.ndarray)


def _mass_work(layers: int, batch: int, heads: int, n: int) -> Work:
    # 4 bytes per float32: the entropies (L, B, H, N) are read; saliency, probabilities
    # and mass, (B, N) each, are written. The softmax takes one exp per token.
    return Work(4 * batch * n * (layers * heads + 3), exps=batch * n)


def _linkage_work(batch: int, n: int, dim: int) -> Work:
    # The cosine matrix is computed; then each of its float32 entries is read once.
    work = cosine_work(batch, n, dim)
    return work._replace(bytes=work.bytes + 4 * batch * n * n)


_CALLS: dict[str, Callable[..., Any]] = {  # the keys are function names of workload.py
    "self_attention": lambda *shape: qm.self_attention_entropy(array(*shape)),
    "query_key": lambda *shape: qm.query_key_entropy(array(*shape), array(*shape)),
    "given_attention": lambda *shape: qm.attention_entropy(array(*shape, shape[-1])),
    "received": lambda *shape: qm.attention_received(
        query=array(*shape), key=array(*shape)
    ),
    "received_of_given": lambda *shape: qm.attention_received(array(*shape, shape[-1])),
    "cosine": lambda *shape: qm.cosine_similarity(array(*shape)),
    "merge": lambda b, n, d, k: qm.merge_tokens(
        array(b, n, d),
        array(b, n, dtype=np.int32),
        k,
        mass=array(b, n, dtype=np.float32),
    ),
    "nearest": lambda b, n, d, k: qm.reconstruction_error(
        array(b, n, d), array(b, k, d)
    ),
    "alignment": lambda b, k, d: qm.alignment_loss(array(b, k, d), qm.MLPPrior.init(d)),
}


SIZE = "B=8 N=4096"
SMALL = "B=1 N=576"  # here, tiles of 128 x 128 would leave most of the GPU idle
_AT_BOTH = "self_attention", "query_key", "received", "cosine", "nearest"


def of_the_table() -> Iterator[Operation]:
    """Yield the operations whose instructions are counted."""
    # `saliency to mass` and linkage have no row in workload.py; they follow the others.
    for size, title, make, count, sizes in operations("all", MAX_ATTENTION_BYTES):
        call = _CALLS.get(make.__name__)
        if call and (size == SIZE or (size == SMALL and make.__name__ in _AT_BOTH)):
            run = functools.partial(call, *sizes)
            yield Operation(title, count(*sizes), run, make.__name__ == "alignment")
    layers, b, h, n, d = 12, 8, 16, 4096, 1024
    yield Operation(
        f"{SIZE} L={layers} H={h} saliency to mass",
        _mass_work(layers, b, h, n),
        lambda: saliency_gumbel_mass_cuda(
            device_array.empty((layers, b, h, n), np.float32),
            *("low", 0.1, (0, 0), 0.01, None),
        ),
    )
    yield Operation(
        f"{SIZE} D={d} average linkage",
        _linkage_work(b, n, d),
        lambda: qm.linkage(array(b, n, d), "average"),
    )


class _Patches:
    """The part of pytest's monkeypatch that `card_device.install` uses."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, value))


def launches_of(operation: Operation) -> list[Launch]:
    """Return the launches of an operation, in order."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        patches = _Patches(stack)
        device = card_device.install(patches, H200)
        # Launches are recorded, and also checked: the device notes those it refuses.
        note = recording(lambda launch: launches.append(_described(launch)))
        patches.setattr(cuda, "launch", note)
        device.run(operation.title, operation.call)
    if device.faults:
        raise RuntimeError(f"an H200 would refuse launches: {', '.join(device.faults)}")
    return launches


def _described(launch: Recorded) -> Launch:
    """Return a launch whose scalar arguments have their names from the source."""
    *size, args = launch
    # The arguments have no names; the kernel's source declares them in this order.
    declared = card_device.parameters_of(cuda.source(launch.file), *launch[1:3])
    pairs = list(zip(declared, args, strict=True))
    numbers = {p.name: float(x) for p, x in pairs if not p.pointer}
    arrays = sum(x.nbytes for _, x in pairs if isinstance(x, np.ndarray))
    return Launch(*size, numbers, arrays)
