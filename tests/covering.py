"""Chooses enough of a test's cases that every two values of its parameters meet.

Of a test with three parameters or more, the full product is many cases that differ in
nothing that matters: a fault shows at a value, or where two values meet. ``pytest
--every-case`` runs the product. conftest.py takes the hooks from here.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence

import pytest


def covering(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return the places of cases that hold every pair of values there is, in order.

    A case is a tuple of values, one for each parameter. Greedy: the case with the most
    new pairs comes next, of equal ones the first.
    """
    pairs = [
        set(itertools.combinations(enumerate(case), 2)) for case in cases
    ]  # ((parameter, value), (parameter, value))
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda k: len(pairs[k] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def thin(items: list) -> tuple[list, list]:
    """Return the tests that run and those that do not, in order."""
    groups = defaultdict(list)
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if len(values) > 2:
            case = tuple(map(repr, values.values()))
            groups[item.path, item.parent.name, item.originalname].append((item, case))
    dropped = set()
    for group in groups.values():
        kept = set(covering([values for _, values in group]))
        dropped |= {item for k, (item, _) in enumerate(group) if k not in kept}
    return (
        [item for item in items if item not in dropped],
        [item for item in items if item in dropped],
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "run every case of tests with three parameters or more"
    parser.addoption("--every-case", action="store_true", help=what)


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    if not config.getoption("every_case"):
        items[:], left_out = thin(items)
        config.hook.pytest_deselected(items=left_out)
