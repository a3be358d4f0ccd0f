"""The least work of the operations, counted by hand, and the plot of their floors."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(scope="module")
def benchmarks():
    """Yield the modules of benchmarks/, which are scripts in one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import roofline
        import workload

        yield roofline, workload


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close("all")


def test_work_by_hand(benchmarks):
    _, workload = benchmarks
    # 5 tokens, D = 3, K = 2, with 2 bytes per entry: 5 tokens are read and 2 written,
    # (5 + 2) * 3 * 2 = 42 bytes. Labels (int32) and mass (float32) are 5 * 4 = 20 each.
    # Each of the 15 entries takes a multiplication and an addition, 30 flops.
    assert workload.merge_work(1, 5, 3, 2) == (42 + 20 + 20, 30, 0)
    assert workload.unmerge_work(1, 5, 3, 2) == (42 + 20, 0, 0)
    # L = 2 layers: 2 * 5 * 3 * 2 = 60 bytes. Half of the 2 * 25 products of length 3,
    # 6 flops each, is 150; each of the 50 scores has an exp.
    assert workload.self_attention_work(2, 1, 5, 3) == (60, 150, 50)
    # H = 2 heads, d = 4: 2 * 5 * 4 entries of Q and as many of K are 160 bytes. The 50
    # scores take 8 flops and an exp each.
    assert workload.query_key_work(1, 1, 2, 5, 4) == (160, 400, 50)
    # 25 probabilities: 2 bytes, 2 flops and a logarithm each.
    assert workload.given_attention_work(1, 1, 1, 5) == (50, 50, 25)


def test_the_slowest_part_is_the_floor(benchmarks):
    roofline, workload = benchmarks
    # Each case is slow in one resource, for example 40 bytes at 10 per second: 4000 ms.
    ceilings = {"bytes": 10.0, "flops": 100.0, "exps": 5.0, "launch_s": 0.5}
    for work, bound, ms in (
        ((40, 100, 5), "bytes", 4000),
        ((10, 300, 5), "flops", 3000),
        ((10, 100, 10), "exps", 2000),
        ((1, 1, 0), "launch", 500),
    ):
        row = roofline.floor_of("an operation", workload.Work(*work), ceilings)
        assert (row["bound"], row["floor_ms"]) == (bound, ms)
        assert tuple(row["work"].values()) == work


def has_point(lines, x, y):
    """Return whether a line consists of this one point."""
    return any(np.allclose(line.get_xydata(), [[x, y]]) for line in lines)


def test_picture_of_a_run_cut_short_is_of_the_size_with_most_rows(benchmarks):
    roofline, _ = benchmarks
    rows = roofline.unmeasured()["rows"]
    small, large = rows[0]["size"], rows[-1]["size"]
    count = sum(row["size"] == small for row in rows)
    # The largest size has one row less than the smallest.
    cut = [row for row in rows if row["size"] == small]
    cut += [row for row in rows if row["size"] == large][: count - 1]
    assert {row["size"] for row in roofline.largest({"rows": cut})} == {small}
    assert {row["size"] for row in roofline.largest({"rows": rows})} == {large}


def test_picture(benchmarks):
    """The floors, and the measured times if there are any, are at the right points."""
    roofline, _ = benchmarks
    report = roofline.unmeasured()
    size = report["rows"][-1]["size"]
    first = next(row for row in report["rows"] if row["size"] == size)
    for ms in ({}, {"optimized": 4.0, "torch": 8.0}):
        first["ms"] = ms
        left, right = roofline.draw(report).axes
        count = len(roofline.largest(report))
        # One bar for each operation of the largest size.
        assert len(right.patches) == count < len(report["rows"])
        intensity = first["work"]["flops"] / first["work"]["bytes"]
        floor = 1e3 * first["work"]["flops"] / first["floor_ms"]
        assert has_point(left.lines, intensity, floor)
        assert has_point(right.lines, first["floor_ms"], 0)
        for time in (4.0, 8.0):
            there = time in ms.values()
            rate = 1e3 * first["work"]["flops"] / time
            assert has_point(left.lines, intensity, rate) == there
            assert has_point(right.lines, time, 0) == there
        # Every operation with flops has its number on the left, once.
        numbers = ", ".join(text.get_text() for text in left.texts).split(", ")
        without = [row["work"]["flops"] == 0 for row in roofline.largest(report)]
        assert len(numbers) == len(set(numbers)) == count - sum(without)
