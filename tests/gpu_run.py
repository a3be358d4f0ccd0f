"""How pytest runs on a GPU: ``-p gpu_run``; see ``benchmarks/gpu.sh``.

Every failure is written to the file that ``QM_CUPY_FAILURES`` names, as it happens: a
run that is cut short keeps what it found. An illegal access makes each later call of
its process fail: such a process is named there and ended, and pytest-xdist starts
another one for the tests that are left.
"""

import os
from pathlib import Path

import pytest

_POISONED = 70  # the exit status of a process that has lost the GPU


def pytest_sessionstart(session):
    """Refuse to run without a GPU: all tests skipped would look like success."""
    try:
        import cupy

        cupy.zeros(1).get()
    except Exception as error:
        pytest.exit(f"no GPU: {type(error).__name__}: {error}", returncode=3)
    if os.environ.get("QM_CUPY_NO_POOL") == "1":
        cupy.cuda.set_allocator(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    failed = report.failed
    if call.when == "call" and not failed:
        failed = not _gpu_answers()  # what the test started and did not wait for
    if failed and not _gpu_answers():
        _write(f"POISONED {item.nodeid}", report.longreprtext)
        if hasattr(item.config, "workerinput"):
            os._exit(_POISONED)  # pytest-xdist reports the test as failed and goes on
        pytest.exit(f"the GPU is lost to this process since {item.nodeid}", _POISONED)
    return report


def pytest_configure(config):
    """Write failures where all reports arrive: in the first process."""
    if not hasattr(config, "workerinput"):  # which pytest-xdist gives to the others
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
    path = os.environ.get("QM_CUPY_FAILURES")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{title}\n{text}\n\n")
