"""Selects test cases so that every two values of two parameters occur together.

A test with three parameters or more has a full product of cases, most of which differ
in nothing that matters: a fault shows at one value, or where two values occur together.
``pytest --every-case`` runs the product. conftest.py imports the hooks from here.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence

import pytest


def covering(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return the indices, ascending, of cases that together have every pair of values.

    A case is a tuple of values, one for each parameter. The algorithm is greedy: next
    comes the case with the most new pairs, and the first of those with equally many.
    """
    pairs = [
        set(itertools.combinations(enumerate(case), 2)) for case in cases
    ]  # ((parameter, value), (parameter, value))
    missing, selected = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda k: len(pairs[k] & missing))
        selected.append(best)
        missing -= pairs[best]
    return sorted(selected)


def thin(items: list) -> tuple[list, list]:
    """Return the tests that run and those that are left out, in order."""
    groups = defaultdict(list)
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        # With one or two parameters every case is a pair of its own: nothing to
        # leave out.
        if len(values) > 2:
            # Values such as arrays are not hashable, but their texts are.
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
    text = "run every case of tests with three parameters or more"
    parser.addoption("--every-case", action="store_true", help=text)


@pytest.hookimpl(trylast=True)  # after -k and -m have deselected theirs
def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    if not config.getoption("every_case"):
        items[:], left_out = thin(items)
        config.hook.pytest_deselected(items=left_out)
