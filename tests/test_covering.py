"""Which cases of a test with many parameters run."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from covering import covering


def pairs(cases):
    """Return every pair ((parameter, value), (parameter, value)) of some cases."""
    return {
        pair for case in cases for pair in itertools.combinations(enumerate(case), 2)
    }


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 4, 8, 2), (5, 3, 2)])
def test_few_cases_have_every_pair_of_values(sizes):
    product = list(itertools.product(*(range(size) for size in sizes)))
    selected = [product[k] for k in covering(product)]
    assert pairs(selected) == pairs(product)
    *_, second, first = sorted(sizes)
    # Each case has one pair of the two largest parameters, so at least their
    # product is needed. A greedy choice stays below twice that.
    assert first * second <= len(selected) < min(len(product), 2 * first * second)


def test_cases_that_are_not_a_product_keep_every_value():
    cases = [("a", 1, True), ("a", 2, False), ("b", 1, False), ("a", 1, False)]
    assert covering(cases) == [0, 1, 2]  # every pair of the last is in another case
    assert covering([*cases, ("c", 1, False)]) == [0, 1, 2, 4]
    assert covering([("a", 1, True)] * 2) == [0]


TEST = """
import pytest

@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [4, 5, 6])
@pytest.mark.parametrize("c", [7, 8])
def test_product(a, b, c): pass

@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [4, 5, 6])
def test_pairs(a, b): pass
"""


# The first test has 3 * 3 * 2 = 18 cases. Nine of them have all pairs of a and b, and
# the second test adds nine: 18 run. "4-1" matches three cases, with new pairs in each.
@pytest.mark.parametrize(
    ("options", "count"), [([], 18), (["--every-case"], 27), (["-k", "4-1"], 3)]
)
def test_how_many_cases_run(tmp_path, options, count):
    (tmp_path / "test_it.py").write_text(TEST, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "covering", "-q", *options]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        command, cwd=tmp_path, env=here, capture_output=True, text=True, check=True
    )
    assert f"{count} passed" in done.stdout
