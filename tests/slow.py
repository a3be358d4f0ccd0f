"""Lists the tests that take long, with their reasons, at the end of a run.

A test gives its reason itself: ``@pytest.mark.slow("compiles torch's graph")``. A slow
test without a reason is listed too, so that the wait is explained or fixed. conftest.py
imports the hooks from here.
"""

import pytest

LONG = 5  # seconds


def pytest_runtest_setup(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("slow"):
        # The report keeps `user_properties`, also when pytest-xdist sends it from a
        # worker.
        item.user_properties.append(("slow", mark.args[0]))


def pytest_terminal_summary(terminalreporter) -> None:
    lines = []
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and report.duration > LONG:
            reason = dict(report.user_properties).get("slow", "no reason")
            lines.append((report.duration, f"{report.nodeid}: {reason}"))
    if lines:
        terminalreporter.section(f"tests of more than {LONG} s")
    for seconds, line in sorted(lines, reverse=True):
        terminalreporter.line(f"{seconds:6.1f} s  {line}")
