"""The loops of the kernels are as short as in the committed table of instructions."""

import copy
import json
from pathlib import Path

import pytest
from benchmark_scripts import run_main
from seam import cuda


@pytest.fixture(scope="module")
def scripts():
    """Yield the modules of benchmarks/, which are scripts in one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import instructions
        import kernel_models
        import launches

        yield instructions, kernel_models, launches


@pytest.fixture(scope="module")
def table(scripts):
    return json.loads(scripts[0].TABLE.read_text(encoding="utf-8"))


def counted(scripts, title=""):
    """Count the current kernels of the operations whose titles end with `title`."""
    instructions, _, launches = scripts
    report = instructions.new_report()
    operations = [x for x in launches.of_the_table() if x.title.endswith(title)]
    instructions.count_all(report, operations)
    return report


@pytest.mark.machine_code
@pytest.mark.slow("compiles and disassembles ten files")
def test_no_loop_has_grown(scripts, table):
    # Disassembles the files in parallel; `counted` then reuses the results.
    scripts[0].compile_ahead(table["now"]["kernels"])
    now = counted(scripts)
    problems = scripts[0].differences(table["now"], now)
    assert not problems, (
        f"counted by NVRTC {now['nvrtc']}, in the table by {table['now']['nvrtc']}:\n"
        + "\n".join(problems)
        + "\nIf this change is intended, refresh the table: "
        "python benchmarks/resources.py --counts "
        "--json benchmarks/results/instructions.json"
    )


@pytest.mark.machine_code
@pytest.mark.slow("compiles and disassembles a file")
def test_a_longer_loop_is_noticed(scripts, monkeypatch):
    """Two more instructions for each of 32 probabilities exceed the 10 % allowed."""
    before = counted(scripts, "given A")
    assert scripts[0].differences(before, before) == []
    # Change a line of the source, and count again.
    source = cuda.source
    line = "            sum += a;\n"
    assert source("optimized/attention_entropy").count(line) == 1
    longer = line + "            sum += a * a * a;\n"
    monkeypatch.setattr(cuda, "source", lambda x: source(x).replace(line, longer))
    (problem,) = scripts[0].differences(before, counted(scripts, "given A"))
    name = "optimized/attention_entropy/attention_entropy bfloat16"
    row = before["kernels"][name]["parts"]["row"]
    assert problem.startswith(f"{name}, row: {row['instructions']} instructions, now ")
    assert f"fp32 {row['units']['fp32']} to " in problem


def test_differences_name_the_kernel(scripts, table):
    differences = scripts[0].differences
    before = table["now"]
    assert before["errors"] == {}
    assert differences(before, before) == []
    name = "optimized/query_key_entropy/query_key_entropy bfloat16"
    now = copy.deepcopy(before)
    step = now["kernels"][name]["parts"]["step"]
    step["instructions"] = int(1.1 * step["instructions"])  # the most that is allowed
    assert differences(before, now) == []
    step["instructions"] += 1
    (grown,) = differences(before, now)
    assert grown.startswith(f"{name}, step: ")
    # A part that is missing is a problem as well, and so is a missing kernel.
    now = copy.deepcopy(before)
    del now["kernels"][name]["parts"]["tile"]
    assert differences(before, now) == [f"{name}, tile: only in the table"]
    del now["kernels"][name]
    assert differences(before, now) == [
        f"{name}: is in the table, but is not launched any more"
    ]
    assert differences(now, before) == [
        f"{name}: is launched now, but is not in the table"
    ]
    now = copy.deepcopy(before)
    name = "optimized/linkage/linkage float32"  # its model names no loop
    now["kernels"][name]["parts"]["code"]["instructions"] *= 2
    (grown,) = differences(before, now)
    assert grown.startswith(f"{name}, code: ")
    now["errors"] = {"merge": "NoPathError: no loop"}
    assert "merge: NoPathError: no loop" in differences(before, now)


@pytest.mark.machine_code
def test_a_kernel_without_a_model_is_an_error(scripts, monkeypatch):
    _, kernel_models, _ = scripts
    name = "optimized/merge_tokens/merge_tokens"
    monkeypatch.delitem(kernel_models.MODELS, name)
    (error,) = counted(scripts, " merge")["errors"].values()
    assert f"{name} is launched and has no model" in error


@pytest.mark.machine_code
def test_a_loop_that_is_not_there_is_an_error(scripts, monkeypatch):
    _, kernel_models, _ = scripts
    name = "optimized/merge_tokens/merge_tokens"
    # The merge multiplies without tensor cores, so it has no HMMA.
    loop = kernel_models.Loop({"HMMA": 1}, lambda sizes: 1.0)
    model = kernel_models.Model({"step": loop})
    monkeypatch.setitem(kernel_models.MODELS, name, model)
    (error,) = counted(scripts, " merge")["errors"].values()
    assert "merge_tokens: no loop passes 1 HMMA" in error


@pytest.mark.machine_code
def test_the_script_writes_an_entry_and_keeps_the_other(scripts, monkeypatch, tmp_path):
    import model
    import resources

    _, _, launches = scripts
    merge = [x for x in launches.of_the_table() if x.title.endswith(" merge")]
    monkeypatch.setattr(launches, "of_the_table", lambda: merge)
    path = tmp_path / "table.json"
    arguments = "--counts", "--json", path
    assert run_main(monkeypatch, resources, *arguments, "--before", "a commit") == 0
    assert run_main(monkeypatch, resources, *arguments) == 0
    table = json.loads(path.read_text())
    # Both runs counted the same kernels; the second run kept the entry of the first.
    assert table["before"] == {"commit": "a commit", **table["now"]}
    assert len(table["now"]["kernels"]) == 2
    # Without models the run fails, and the entry is still there.
    monkeypatch.setattr(model, "MODELS", {})
    assert run_main(monkeypatch, resources, *arguments) == 1
    assert json.loads(path.read_text())["before"] == table["before"]


@pytest.mark.machine_code
def test_launches_and_models_by_hand(scripts):
    """Tiles of 128 x 256 with D = 1024 take 32 steps of 32 elements.

    A sequence has 16 x 17 = 272 of them, half of the symmetric matrix.
    """
    report = counted(scripts, "cosine matrix")
    large = report["operations"][-1]
    norms, cosines = large["launches"]
    assert norms["kernel"] == "optimized/token_norms/token_norms bfloat16"
    assert (cosines["blocks"], cosines["threads"]) == (8 * 16 * 17, 256)
    assert cosines["times"] == {"step": 32, "rest": 1}
    # 2176 blocks on 132 multiprocessors: at most 17 on each. A block has 8 warps with
    # 32 x 64 products each, of which the tensor cores finish 0.62 per clock.
    clocks = 17 * 8 * 32 * 64 / 0.62
    assert cosines["ms"]["tensor"] == pytest.approx(1e3 * clocks / 1.98e9, rel=1e-3)
    # Each block copies 384 rows of 2 KiB from L2, and writes 2 tiles of 128 KiB: its
    # own, and its mirror image.
    moved = 2176 * (384 * 2048 + 2 * 131072)
    assert cosines["ms"]["L2"] == pytest.approx(1e3 * moved / 5.5e12, rel=1e-3)
    assert large["predicted_ms"] >= large["floor_ms"]
