"""What the operations must do at least, by hand, and the picture of their floors."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmarks' modules, which are scripts beside each other."""
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
    # 5 tokens of 3 halves to 2: (5 + 2) * 3 * 2 bytes, int32 labels, float32 mass.
    assert workload.merge_work(1, 5, 3, 2) == (42 + 20 + 20, 30, 0)
    assert workload.unmerge_work(1, 5, 3, 2) == (42 + 20, 0, 0)
    # Half of 5 x 5 products of 3; each score has an exp.
    assert workload.self_attention_work(2, 1, 5, 3) == (60, 150, 50)
    assert workload.query_key_work(1, 1, 2, 5, 4) == (160, 400, 50)
    assert workload.given_attention_work(1, 1, 1, 5) == (50, 50, 25)


def test_the_slowest_part_is_the_floor(benchmarks):
    roofline, workload = benchmarks
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


def at(lines, x, y):
    return any(np.allclose(line.get_xydata(), [[x, y]]) for line in lines)


def test_picture_of_a_run_cut_short_is_of_the_size_with_most_rows(benchmarks):
    roofline, _ = benchmarks
    rows = roofline.unmeasured()["rows"]
    small, large = rows[0]["size"], rows[-1]["size"]
    count = sum(row["size"] == small for row in rows)
    cut = [row for row in rows if row["size"] == small]
    cut += [row for row in rows if row["size"] == large][: count - 1]
    assert {row["size"] for row in roofline.largest({"rows": cut})} == {small}
    assert {row["size"] for row in roofline.largest({"rows": rows})} == {large}


def test_picture(benchmarks):
    """Without a GPU floors alone, with one its times too, at the right places."""
    roofline, _ = benchmarks
    report = roofline.unmeasured()
    size = report["rows"][-1]["size"]
    first = next(row for row in report["rows"] if row["size"] == size)
    for ms in ({}, {"optimized": 4.0, "torch": 8.0}):
        first["ms"] = ms
        left, right = roofline.draw(report).axes
        count = len(roofline.largest(report))
        assert len(right.patches) == count < len(report["rows"])
        intensity = first["work"]["flops"] / first["work"]["bytes"]
        floor = 1e3 * first["work"]["flops"] / first["floor_ms"]
        assert at(left.lines, intensity, floor)
        assert at(right.lines, first["floor_ms"], 0)
        for time in (4.0, 8.0):
            there = time in ms.values()
            rate = 1e3 * first["work"]["flops"] / time
            assert at(left.lines, intensity, rate) == there
            assert at(right.lines, time, 0) == there
        numbers = ", ".join(text.get_text() for text in left.texts).split(", ")
        without = [row["work"]["flops"] == 0 for row in roofline.largest(report)]
        assert len(numbers) == len(set(numbers)) == count - sum(without)
