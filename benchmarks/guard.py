"""What keeps a benchmark going when a part of it fails, and what stops it in order.

One contender's failure is an entry of the report. An interrupt leaves what was measured
so far. Only a GPU that this process has lost ends a run early: after an illegal access,
for example, every later call fails as well.
"""

import gc
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

FAILED, POISONED, INTERRUPTED = 1, 4, 130  # exit statuses; 0 if all went well

# After these the CUDA context is of no further use ("CUDA Runtime API", "cudaError").
# The names are CuPy's and JAX's, the phrases torch's.
_STICKY = (
    "cudaErrorIllegalAddress",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorIllegalInstruction",
    "cudaErrorHardwareStackError",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorECCUncorrectable",
    "cudaErrorContained",
    "CUDA_ERROR_ILLEGAL_",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "illegal memory access",
    "misaligned address",
    "illegal instruction was encountered",
    "unspecified launch failure",
    "the launch timed out",
    "device-side assert",
)


class PoisonedError(RuntimeError):
    """The GPU is lost to this process: every later call would fail."""


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def sticky(error: BaseException) -> bool:
    """Return whether an error, or one that it comes from, has spoilt the context."""
    seen: BaseException | None = error
    while seen is not None:
        if any(name in str(seen) for name in _STICKY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def synchronize() -> None:
    """Wait for the GPU, if CuPy or torch is using one."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and cupy.is_available():
        cupy.cuda.runtime.deviceSynchronize()
    elif torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def lost() -> bool:
    """Return whether the GPU refuses even to be waited for, twice in a row."""
    for _ in range(2):  # the first may report an error that passes
        try:
            synchronize()
        except Exception:
            continue
        return False
    return True


def free_memory() -> None:
    """Give back what the pools hold; nothing that fails here matters."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    gc.collect()
    with suppress(Exception):
        if cupy is not None and cupy.is_available():
            cupy.get_default_memory_pool().free_all_blocks()
    with suppress(Exception):
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def guarded(errors: dict[str, str], name: str, during: str = "") -> Iterator[None]:
    """Record an error of the block as that of `name`, and go on.

    Raises
    ------
    PoisonedError
        If the GPU is lost. Its text names what was under way.
    """
    try:
        yield
    except PoisonedError:  # of a block within
        raise
    except Exception as error:
        errors[name] = one_line(error)
        spoilt = sticky(error)
        # Frames of the traceback hold arrays, which no pool could give back.
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__context__
        if spoilt or lost():
            what = f"{during}, {name}" if during else name
            raise PoisonedError(f"{what}: {errors[name]}") from None
        free_memory()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, as soon as Python runs.

    A call of C or of the GPU that does not return is not interrupted.
    """
    main = threading.current_thread() is threading.main_thread()
    if not math.isfinite(seconds) or not main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    # Again every second: a destructor that it falls into would swallow the first.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def signals(handler: Any) -> Iterator[None]:
    """Let SIGINT and SIGTERM come to a handler within the block.

    A shell starts background commands with SIGINT ignored, which Python inherits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def complete(
    measure: Callable[[], Any],
    save: Callable[[], Any],
    show: Callable[[], Any],
    failed: Callable[[], bool],
) -> int:
    """Measure, then save and show whatever there is; return the exit status."""
    status = 0
    try:
        with signals(signal.default_int_handler):
            measure()
    except KeyboardInterrupt:
        status = INTERRUPTED
        say("interrupted: what follows is what was measured so far")
    except PoisonedError as error:
        status = POISONED
        say(f"stopped, this process has lost the GPU: {error}")
    except Exception:  # a fault of the benchmark itself
        status = FAILED
        traceback.print_exc()
    with signals(signal.SIG_IGN):  # a second interrupt does not cut this off
        for last in (save, show):
            try:
                last()
            except Exception:
                status = status or FAILED
                traceback.print_exc()
        sys.stdout.flush()
    return status or (FAILED if failed() else 0)


def leave(status: int) -> None:
    """End the process; one that has lost the GPU skips destructors, which may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == POISONED:
        os._exit(status)
    sys.exit(status)
