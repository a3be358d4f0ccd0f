"""Keep a benchmark running when a part of it fails, and stop it cleanly.

A contender that fails becomes an entry of the report. An interrupt keeps the figures
that were measured before it. Only the loss of the GPU ends a run early: after an
illegal access, for example, every later call of the process fails too.
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

FAILED, POISONED, INTERRUPTED = 1, 4, 130  # exit statuses; 0 means success

# After these errors the CUDA context cannot be used any more ("CUDA Runtime API",
# "cudaError"). CuPy and JAX report the names, torch the phrases.
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
    """This process has lost the GPU: every later call would fail."""


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """Return an error's type and text in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def sticky(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, has broken the CUDA context."""
    seen: BaseException | None = error
    # A library can wrap the CUDA error in an error of its own.
    while seen is not None:
        if any(name in str(seen) for name in _STICKY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def synchronize() -> None:
    """Wait for the GPU, if CuPy or torch is using one."""
    # Look in `sys.modules`: a library that is not imported has no work to wait for.
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and cupy.is_available():
        cupy.cuda.runtime.deviceSynchronize()
    elif torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def lost() -> bool:
    """Return whether waiting for the GPU fails twice in a row."""
    for _ in range(2):  # the first wait may report an earlier error, which then passes
        try:
            synchronize()
        except Exception:
            continue
        return False
    return True


def free_memory() -> None:
    """Free the memory that the pools hold, and ignore failures."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    gc.collect()  # arrays in reference cycles still hold memory
    with suppress(Exception):
        if cupy is not None and cupy.is_available():
            cupy.get_default_memory_pool().free_all_blocks()
    with suppress(Exception):
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def guarded(errors: dict[str, str], name: str, during: str = "") -> Iterator[None]:
    """Record an error of the block in ``errors[name]``, and go on.

    Raises
    ------
    PoisonedError
        If the GPU is lost. The text names the operation (`during`) and `name`.
    """
    try:
        yield
    except PoisonedError:  # raised by an inner block
        raise
    except Exception as error:
        errors[name] = one_line(error)
        spoilt = sticky(error)
        # Frames of the traceback hold arrays. While they do, no pool can free them.
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__context__
        # A known text of the error, or a GPU that does not answer any more.
        if spoilt or lost():
            what = f"{during}, {name}" if during else name
            raise PoisonedError(f"{what}: {errors[name]}") from None
        free_memory()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when its seconds are over and Python code runs.

    A call into C or to the GPU that does not return is not interrupted.
    """
    # Signals reach the main thread only, and Windows has no SIGALRM.
    main = threading.current_thread() is threading.main_thread()
    if not math.isfinite(seconds) or not main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"not finished within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    # Repeat every second: an exception that is raised in a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1)
    try:
        yield
    finally:
        # Stop the timer before the old handler returns.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def signals(handler: Any) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler` in the block.

    This is necessary because a shell starts background commands with SIGINT ignored,
    and Python inherits that.
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
    """Measure, then save and show the figures so far; return the exit status."""
    status = 0
    try:
        with signals(signal.default_int_handler):
            measure()
    except KeyboardInterrupt:
        status = INTERRUPTED
        say("interrupted: the figures below are those measured so far")
    except PoisonedError as error:
        status = POISONED
        say(f"stopped: this process has lost the GPU: {error}")
    except Exception:  # an error of the benchmark itself, outside any `guarded` block
        status = FAILED
        traceback.print_exc()
    # Ignore a second interrupt, so that the figures are written completely. If saving
    # fails, the tables are printed all the same.
    with signals(signal.SIG_IGN):
        for last in (save, show):
            try:
                last()
            except Exception:
                status = status or FAILED
                traceback.print_exc()
        sys.stdout.flush()
    return status or (FAILED if failed() else 0)


def leave(status: int) -> None:
    """End the process with an exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the GPU, destructors may abort the process; `_exit` skips them.
    if status == POISONED:
        os._exit(status)
    sys.exit(status)
