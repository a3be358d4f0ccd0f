"""Cards that replace the device on which the library launches its kernels.

`install` replaces it. The public functions then run all of their Python code, on arrays
whose values mean nothing, and every launch is checked against the limits of the cards.
"""

import functools
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import device_array
import nvrtc
from cards import Kernel, LaunchError, Parameter, describe
from device_array import DeviceArray
from seam import cuda

from qm_cupy.cuda.compile import TF32

# The types of parameters in the kernels' sources.
_TYPES = {
    "long long": "int64",
    "unsigned long long": "uint64",
    "int": "int32",
    "unsigned": "uint32",
    "unsigned char": "uint8",
    "float": "float32",
    "double": "float64",
    "bool": "bool",
}
# Groups: type, star, name.
_DECLARED = re.compile(r"(?:const )?([\w ]+?) ?(\*?) ?(?:__restrict__ )?(\w+)")


def _accumulation(dtype):
    return "float64" if dtype == "float64" else "float32"


def parameters_of(source, kernel, dtype):
    """Return the parameters of a kernel as its source declares them."""
    storage = "float32" if dtype == TF32 else dtype  # TF32 is float32 in memory
    # The types that a source gets as -D macros.
    types = {**_TYPES, "real_t": storage, "acc_t": _accumulation(dtype)}
    # [^{;]: from __global__ to the kernel's name without a body or a declaration
    # between.
    pattern = rf"__global__[^{{;]*?\b{kernel}\(([^)]*)\)"
    declared = re.search(pattern, source)
    parameters = []
    for text in " ".join(declared[1].split()).split(", "):
        ctype, star, name = _DECLARED.fullmatch(text).groups()
        parameters.append(Parameter(name, types[ctype], bool(star)))
    return parameters


def facts_of(file, dtype, arch):
    """Return the facts of a file's kernels, compiled as CuPy would for a card."""
    options = (*cuda.options(dtype), f"-arch=sm_{arch}")
    return nvrtc.kernel_facts(cuda.source(file), options)


def files(dtype):
    """Return the files with kernels of a dtype; only optimized ones have TF32."""
    every = cuda.kernel_files()
    return [x for x in every if dtype != TF32 or x.startswith("optimized/")]


def compile_kernels(dtype, cards):
    """Compile all files for a dtype and its accumulation dtype, in threads."""
    # Compilation is slow, so `kernel_facts` keeps its results.
    jobs = [
        (file, compiled_dtype, card.arch)
        for compiled_dtype in {dtype, _accumulation(dtype)}
        for file in files(compiled_dtype)
        for card in cards
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: facts_of(*job), jobs))


class Device:
    """Replaces the device by cards, by all of them at once until one is looked at.

    A launcher that does not ask for the limits of the card makes the same launches on
    all of them, so a call runs once for all. Once it asks, it is on one card, and `run`
    repeats the call for the others. Launches continue after a fault, so that `faults`
    contains all of them.
    """

    def __init__(self, cards):
        # `_now`: the cards that the current launches stand for.
        self.cards = self._now = tuple(cards)
        self._trial = (
            None  # a card that answers a question without staying the only one
        )
        self.faults = {}  # message -> calls
        self.launches = Counter()  # "file/kernel" -> number of launches
        self.raw_kernel = functools.cache(functools.partial(_Launcher, self))

    def run(self, name, call, *args):
        """Make a call, and repeat it for the other cards if it depends on the card."""
        self._now = self.cards
        self._call, self._looked = name, False
        call(*args)
        for card in self.cards[1:] if self._looked else ():
            self._now = (card,)
            call(*args)

    def look(self):
        """Return the one card that stays in place from now on."""
        # Inside `agreed` the card is only tried.
        if self._trial:
            return self._trial
        self._looked, self._now = True, self._now[:1]
        return self._now[0]

    def agreed(self, ask):
        """Return a function that gives `ask`'s answer if all cards in place agree.

        If they differ, one card stays in place and gives the answer. Most launches use
        the same tiles on every card; then the call need not be repeated.
        """

        def answer(*args):
            answers = []
            try:
                for card in self._now:
                    self._trial = card
                    answers.append(ask(*args))
            finally:
                self._trial = None
            same = all(x == answers[0] for x in answers)
            # Without a trial card, `ask` calls `look`, which settles on one card.
            return answers[0] if same else ask(*args)

        return answer

    def check(self, kernels, check_kernel):
        """Check a kernel, compiled for each card, on the cards in place."""
        for card in self._now:
            try:
                check_kernel(kernels[card])
            except LaunchError as error:
                self.faults.setdefault(str(error), []).append(self._call)


class _Launcher:
    """A kernel on the cards in place: the return value of ``cuda.raw_kernel``."""

    def __init__(self, device, file, kernel, dtype, cooperative=False):
        parameters = parameters_of(cuda.source(file), kernel, dtype)
        name = f"{file}/{kernel} ({dtype})"
        self._device, self._short = device, f"{file}/{kernel}"
        self._parameters = parameters
        # Registers and shared memory differ between architectures, so each card has
        # its own.
        self._kernels = {
            card: Kernel(
                name, facts_of(file, dtype, card.arch)[kernel], parameters, card,
                cooperative,
            )
            for card in device.cards
        }  # fmt: skip

    def __call__(self, grid, block, args, *, shared_mem=0):
        self._device.launches[self._short] += 1
        launch = describe(self._parameters, grid, block, args, shared_mem)
        self._device.check(self._kernels, lambda kernel: kernel.check(launch))

    @property
    def shared_size_bytes(self):
        return self._kernels[self._device.look()].shared_size_bytes

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._kernels[self._device.look()].max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        def ask(kernel):
            kernel.max_dynamic_shared_size_bytes = size

        # The size follows from the limit of one card, so the call is on that card.
        self._device.look()
        self._device.check(self._kernels, ask)


def install(monkeypatch, *cards):
    """Replace the device by cards until the test ends; return the `Device`."""
    device = Device(cards)
    convert = cuda._to_numpy_or_cupy

    def upload(name, x):
        return convert(name, x).view(DeviceArray)

    def limits():
        card = device.look()
        return cuda.Device(card.multiprocessors, card.shared)

    monkeypatch.setattr(cuda, "_to_numpy_or_cupy", upload)
    # Results stay arrays of the device.
    monkeypatch.setattr(cuda, "_convert_back_to", lambda like: lambda x: x)
    monkeypatch.setattr(cuda, "raw_kernel", device.raw_kernel)
    monkeypatch.setattr(cuda, "empty", device_array.empty)
    monkeypatch.setattr(cuda, "to_device", device_array.to_device)
    monkeypatch.setattr(cuda, "to_host", device_array.to_host)
    monkeypatch.setattr(cuda, "current_device", limits)
    # Both ask for the limits of the device. On most cards the answer is the same.
    for ask in cuda.select_shape, cuda.kept_bytes:
        monkeypatch.setattr(cuda, ask.__name__, device.agreed(ask))
    monkeypatch.setattr(cuda, "free_memory", lambda: device.look().memory)
    monkeypatch.setattr(cuda, "is_cuda", lambda x: isinstance(x, DeviceArray))
    return device
