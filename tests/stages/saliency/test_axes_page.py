"""The tables of docs/stages/axes.md: every form that they list works, as they say."""

import re
from pathlib import Path

import numpy as np
import pytest

import qm_cupy as qm

PAGE = Path(__file__).parents[3] / "docs/stages/axes.md"
# All lengths differ, so an axis that is read as another one gives another shape.
SIZES = {"L": 2, "B": 3, "H": 4, "N": 5, "D": 6, "d": 7}
FUNCTIONS = {
    "`attention_entropy`": (qm.attention_entropy, ["attention"]),
    "`attention_received`": (qm.attention_received, ["attention"]),
    "`query_key_entropy`": (qm.query_key_entropy, ["query", "key"]),
    "`attention_received` of queries and keys": (
        qm.attention_received,
        ["query", "key"],
    ),
    "`self_attention_entropy`": (qm.self_attention_entropy, ["tokens"]),
    "`saliency`": (qm.saliency, ["entropy"]),
    "`attention_mass`": (qm.attention_mass, ["received", "entropy"]),
}


def rows(heading):
    """Return the cells of the table below a heading, without its first two lines."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = re.findall(r"^\|(.*)\|$", text.split("\n## ")[0], re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def shape_of(form):
    """Return the shape of a form such as "(B, N, D)"."""
    return tuple(SIZES[axis] for axis in form.strip("()").split(", "))


def draw(shape):
    return np.random.default_rng(len(shape)).random(shape) + 0.1


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        (name, cells)
        for names, *cells in rows("Functions of saliency")
        for name in names.split(", ")
    ],
)
def test_functions(name, cells):
    function, arguments = FUNCTIONS[name]
    *forms, of_tuple = cells
    assert len(forms) == 4
    results = {}
    for form in forms:
        argument, wanted = map(shape_of, form.split(" → "))
        x = draw(argument)
        got = results[argument] = function(**dict.fromkeys(arguments, x))
        assert got.shape == wanted
    # A tuple of layers: each of the forms without L.
    *single, stack = results
    for shape in single:
        layers = (draw(shape), 2 * draw(shape))
        got = function(**dict.fromkeys(arguments, layers))
        if of_tuple == "→ tuple":
            assert [x.shape for x in got] == [results[shape].shape] * 2
        else:
            assert of_tuple == "→ (B, N)"
            assert got.shape == results[shape].shape
    layers = tuple(draw(stack))
    got = function(**dict.fromkeys(arguments, layers))
    np.testing.assert_array_equal(np.asarray(got), results[stack])


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("row", rows("Sources of `quickmerge`"), ids=lambda row: row[0])
def test_sources(row, column):
    names = [name.strip("`") for name in row[0].split(", ")]
    tokens = draw(shape_of(["(B, N, D)", "(N, D)"][column]))
    forms = row[1 + column].split("; ")
    wanted = {"hidden_states": 2, "saliency": 1}
    assert len(forms) == wanted.get(names[0], (5, 4)[column])
    for form in forms:
        x = draw(shape_of(form.removeprefix("tuple of ")))
        source = (x, 2 * x) if form.startswith("tuple") else x
        merged = qm.quickmerge(tokens, 2, **dict.fromkeys(names, source))
        assert merged.mass.shape == tokens.shape[:-1]
        # Every sequence has the weights that it has alone.
        if column == 0 and not form.startswith("tuple"):
            batch = form.strip("()").split(", ").index("B")
            own = np.take(x, 1, batch)
            if "L" in form:  # the layers of one sequence are a tuple
                own = tuple(own)
            one = qm.quickmerge(tokens[1], 2, **dict.fromkeys(names, own))
            np.testing.assert_array_equal(one.mass, merged.mass[1])
