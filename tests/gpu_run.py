"""The pytest plugin for a GPU: ``-p gpu_run``; see ``benchmarks/gpu.sh``.

Every failure is written at once to the file that ``QM_CUPY_FAILURES`` names, so that a
run that is cut short keeps its results. After an illegal access each later call of the
process fails. Such a process is named in the file and ends, and pytest-xdist starts
another one for the remaining tests.
"""

import os
from pathlib import Path

import pytest

_POISONED = 70  # the exit status of a process that has lost the GPU


def pytest_sessionstart(session):
    """Refuse to run without a GPU: a run that skips all tests looks like success."""
    try:
        import cupy

        cupy.zeros(1).get()
    except Exception as error:
        pytest.exit(f"no GPU: {type(error).__name__}: {error}", returncode=3)
    # compute-sanitizer sees the bounds of each allocation, but not those inside a
    # pool.
    if os.environ.get("QM_CUPY_NO_POOL") == "1":
        cupy.cuda.set_allocator(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    failed = report.failed
    if call.when == "call" and not failed:
        failed = not _gpu_answers()  # work that the test started but did not wait for
    # A failed assertion leaves the GPU usable; an illegal access does not.
    if failed and not _gpu_answers():
        _write(f"POISONED {item.nodeid}", report.longreprtext)
        if hasattr(item.config, "workerinput"):
            os._exit(_POISONED)  # pytest-xdist reports the test as failed and goes on
        pytest.exit(f"the GPU is lost to this process since {item.nodeid}", _POISONED)
    return report


def pytest_configure(config):
    """Write failures in the main process, where the reports of all workers arrive."""
    if not hasattr(config, "workerinput"):  # pytest-xdist sets it in its workers
        config.pluginmanager.register(_Failures())


class _Failures:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            _write(f"FAILED {report.nodeid} ({report.when})", report.longreprtext)


def _gpu_answers():
    import cupy

    try:
        cupy.cuda.runtime.deviceSynchronize()
        return float(cupy.ones(1, cupy.float32).get()[0]) == 1.0
    except Exception:
        return False


def _write(title, text):
    # Append, because several processes may write to the file.
    path = os.environ.get("QM_CUPY_FAILURES")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{title}\n{text}\n\n")
