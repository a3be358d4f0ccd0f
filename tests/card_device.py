"""Cards in the place of the device that the library launches on.

`install` puts them there. The public functions then run all of their Python, on arrays
whose values mean nothing, and every launch is held against the cards.
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
_DECLARED = re.compile(r"(?:const )?([\w ]+?) ?(\*?) ?(?:__restrict__ )?(\w+)")


def _accumulation(dtype):
    return "float64" if dtype == "float64" else "float32"


def parameters_of(source, kernel, dtype):
    """Return the parameters of a kernel as its source declares them."""
    storage = "float32" if dtype == TF32 else dtype
    types = {**_TYPES, "real_t": storage, "acc_t": _accumulation(dtype)}
    pattern = rf"__global__[^{{;]*?\b{kernel}\(([^)]*)\)"
    declared = re.search(pattern, source)
    found = []
    for text in " ".join(declared[1].split()).split(", "):
        ctype, star, name = _DECLARED.fullmatch(text).groups()
        found.append(Parameter(name, types[ctype], bool(star)))
    return found


def facts_of(file, dtype, arch):
    """Return the facts of a file's kernels, compiled as CuPy would for a card."""
    options = (*cuda.options(dtype), f"-arch=sm_{arch}")
    return nvrtc.kernel_facts(cuda.source(file), options)


def files(dtype):
    """Return the files whose kernels can run in a dtype: TF32 is for optimized ones."""
    every = cuda.kernel_files()
    return [x for x in every if dtype != TF32 or x.startswith("optimized/")]


def compile_kernels(dtype, cards):
    """Compile all files for a dtype and the one it accumulates in, in threads."""
    jobs = [
        (file, kind, card.arch)
        for kind in {dtype, _accumulation(dtype)}
        for file in files(kind)
        for card in cards
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: facts_of(*job), jobs))


class Device:
    """Cards in the place of the device, all of them at once while none is looked at.

    A launcher that does not look at the card makes the same launches on all of them,
    so a call runs once. From where it looks, it is on one card; `run` repeats the call
    for the others. Launches go on after a fault, so that `faults` holds them all.
    """

    def __init__(self, cards):
        self.cards = self._now = tuple(cards)
        self._trial = None  # a card that is asked about, without staying on it
        self.faults = {}  # message -> calls
        self.launches = Counter()  # of each kernel, by file/kernel
        self.raw_kernel = functools.cache(functools.partial(_Launcher, self))

    def run(self, name, call, *args):
        """Make a call on every card."""
        self._now = self.cards
        self._call, self._looked = name, False
        call(*args)
        for card in self.cards[1:] if self._looked else ():
            self._now = (card,)
            call(*args)

    def look(self):
        """Return the one card that is in place from now on."""
        if self._trial:
            return self._trial
        self._looked, self._now = True, self._now[:1]
        return self._now[0]

    def agreed(self, ask):
        """Return what `ask` answers on every card in place, or on the one to stay on.

        Most launches take the same tiles everywhere; then a call need not be repeated.
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
            return answers[0] if same else ask(*args)

        return answer

    def hold(self, kernels, check):
        """Check a kernel, which has a variant for each card, on those in place."""
        for card in self._now:
            try:
                check(kernels[card])
            except LaunchError as error:
                self.faults.setdefault(str(error), []).append(self._call)


class _Launcher:
    """A kernel on whatever card is in place: what ``cuda.raw_kernel`` returns."""

    def __init__(self, device, file, kernel, dtype, cooperative=False):
        parameters = parameters_of(cuda.source(file), kernel, dtype)
        name = f"{file}/{kernel} ({dtype})"
        self._device, self._short = device, f"{file}/{kernel}"
        self._parameters = parameters
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
        self._device.hold(self._kernels, lambda kernel: kernel.hold(launch))

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

        self._device.look()
        self._device.hold(self._kernels, ask)


def install(monkeypatch, *cards):
    """Put cards in the place of the device until the test ends; return them at work."""
    device = Device(cards)
    bring_in = cuda._bring_in

    def upload(name, x, *, to_host=False):
        found = bring_in(name, x, to_host=to_host)
        return found if to_host else found.view(DeviceArray)

    def known():
        card = device.look()
        return cuda.Device(card.multiprocessors, card.shared)

    monkeypatch.setattr(cuda, "_bring_in", upload)
    monkeypatch.setattr(cuda, "_leave", lambda example: lambda x: x)
    monkeypatch.setattr(cuda, "raw_kernel", device.raw_kernel)
    monkeypatch.setattr(cuda, "empty", device_array.empty)
    monkeypatch.setattr(cuda, "to_device", device_array.to_device)
    monkeypatch.setattr(cuda, "to_host", device_array.to_host)
    monkeypatch.setattr(cuda, "current_device", known)
    for ask in cuda.select_shape, cuda.kept_bytes:
        monkeypatch.setattr(cuda, ask.__name__, device.agreed(ask))
    monkeypatch.setattr(cuda, "free_memory", lambda: device.look().memory)
    monkeypatch.setattr(cuda, "is_cuda", lambda x: isinstance(x, DeviceArray))
    return device
