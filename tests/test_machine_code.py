"""Loops and paths of small functions, written by hand in nvdisasm's format.

The expected counts are the lines of the shortest path, counted by hand.
"""

import instruction_units
import machine_code
import nvrtc
import pytest
from machine_code import NoPathError


def parsed(*lines):
    """Return the function of some lines. A line that ends with a colon is a label."""
    text = [
        line if line.endswith(":") else f"        /*{i:04x}*/       {line} ;"
        for i, line in enumerate(lines)
    ]
    head = '\n\t.section\t.text.planted,"ax",@progbits\n'
    return machine_code.parse(head + "\n".join(text), ["planted"])["planted"]


# A loop with two paths: 16-bit loads, and 128-bit loads that need two additions more.
SLOW_AND_FAST = (
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@P0 BRA `(.L_x_1)",
    "LDG.E.U16 R1, [R2.64]",  # the slow path, which is shorter
    "BRA `(.L_x_2)",
    ".L_x_1:",
    "LDG.E.128 R4, [R2.64]",
    "FADD R1, R4, R5",
    "FADD R1, R1, R6",
    "@!PT LDS RZ, [RZ]",  # it never runs, so no bytes count
    ".L_x_2:",
    "@P1 BRA `(.L_x_0)",
    "STG.E [R8.64], R1",
    "EXIT",
    "NOP",
)


def test_path_passes_the_instructions_of_the_common_case():
    function = parsed(*SLOW_AND_FAST)
    (loop,) = function.loops
    # ISETP, BRA, LDG.E.U16, BRA, BRA: the shortest path is the one of the rare case.
    assert function.path(loop, {}).instructions == 5
    path = function.path(loop, {"LDG.E.128": 1})
    assert path.units == {"alu": 1, "control": 2, "ldg": 1, "fp32": 2, "other": 1}
    assert path.lane_bytes == {"ldg": 16}
    assert path.count("LDG") == path.count("LDG.E") == path.count("LDG.E.128") == 1
    assert path.count("LD") == path.count("LDG.E.12") == 0
    # Outside of the loop: S2R, STG and EXIT.
    assert function.path(None, {"STG": 1}, [loop]).instructions == 3
    assert function.code.instructions == 12  # all but labels and the NOP
    with pytest.raises(NoPathError, match="no way through the loop passes 2 LDG"):
        function.path(loop, {"LDG": 2})
    with pytest.raises(NoPathError, match="planted: no loop passes 1 HMMA"):
        function.loop_through({"HMMA": 1}, "HMMA")


# A loop inside a loop, then another loop with the same instruction.
NESTED = (
    ".L_x_0:",
    "MOV R1, RZ",
    ".L_x_1:",
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",
    "@P0 BRA `(.L_x_1)",
    "@P1 BRA `(.L_x_2)",
    "MUFU.EX2 R4, R4",
    ".L_x_2:",
    "@P2 BRA `(.L_x_0)",
    ".L_x_3:",  # a loop with 3 instructions for one product; the first has 1.5
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",
    "MOV R1, RZ",
    "@P3 BRA `(.L_x_3)",
    "EXIT",
)


def test_nested_loops_are_counted_apart():
    function = parsed(*NESTED)
    # Five blocks of the outer loop: its start, the inner loop, a branch, MUFU, the end.
    assert [len(loop.blocks) for loop in function.loops] == [1, 1, 5]
    inner, path = function.loop_through({"HMMA": 1}, "HMMA")
    assert path.instructions == 3
    assert path.units == {"tensor": 2, "control": 1}
    around = function.loop_around(inner)
    assert function.path(around, {}, [inner]).instructions == 3
    # With MUFU, the path passes all four other blocks, which have one instruction each.
    whole = function.path(around, {"MUFU.EX2": 1}, [inner])
    assert whole.units == {"control": 2, "alu": 1, "mufu": 1}
    rest = function.path(None, {}, [around])
    assert rest.units == {"tensor": 1, "alu": 1, "control": 2}
    with pytest.raises(NoPathError, match="no loop around"):
        function.loop_around(around)


def test_a_call_costs_what_it_calls():
    function = parsed(
        "@P0 BRA `(.L_x_0)",
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)",
        "BRA `(.L_x_1)",
        ".L_x_0:",
        *["MOV R1, RZ"] * 4,
        ".L_x_1:",
        "@P1 EXIT",
        "EXIT",
        "$__internal_0_$__cuda_sm20_div_s64:",
        *["IMAD R1, R2, R3, R4"] * 3,
        "RET.REL.NODEC R2 `(planted)",
    )
    # The shortest path has the 4 MOV. The other one is longer: CALL, the 4 instructions
    # of the function, and a jump.
    assert function.path(None, {}).units == {"alu": 4, "control": 2}
    called = function.path(None, {"CALL": 1}).units
    assert called == {"imad": 3, "control": 5}


def test_a_jump_whose_predicate_follows_it_is_conditional():
    """BRA P0 and BRA.DIV have no predicate in front, but they may fall through."""
    function = parsed(
        ".L_x_0:",
        "MOV R1, RZ",
        "BRA.DIV UR4, `(.L_x_1)",
        "BRA P0, `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        "SHFL.IDX PT, R1, R1, R2, R3",
        "BRA `(.L_x_0)",
    )
    assert function.path(None, {}).units == {"control": 3, "alu": 1}
    (loop,) = function.loops
    assert function.path(loop, {"SHFL": 1}).instructions == 4


# The bytes are those that one lane moves; 4 is the default of other instructions.
@pytest.mark.parametrize(
    ("opcode", "unit", "size"),
    [
        ("HMMA.16816.F32.BF16", "tensor", 4),
        ("MUFU.EX2", "mufu", 4),
        ("IMAD.WIDE.U32", "imad", 4),
        ("UIADD3", "uniform", 4),
        ("LDSM.16.M88.4", "ldsm", 16),
        ("LDSM.16.MT88.2", "ldsm", 8),
        ("LDGSTS.E.BYPASS.128", "ldgsts", 16),
        ("LDG.E.64.CONSTANT", "ldg", 8),
        ("LDG.E.U8", "ldg", 1),
        ("STS.U16", "sts", 2),
        ("STG.E", "stg", 4),
    ],
)
def test_units_and_bytes(opcode, unit, size):
    assert instruction_units.unit_of(opcode) == unit
    assert instruction_units.lane_bytes(opcode) == size


PLANTED = """
extern "C" __global__ void sums(const float* x, int n, float* y) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    *y = sum;
}
"""


def test_a_compiled_loop_is_recognised_and_its_text_is_kept(monkeypatch, tmp_path):
    """The loop of a real kernel has one load and one multiply-add of 4 bytes."""
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    options = ("-arch=sm_90",)
    text = nvrtc.disassembly(PLANTED, options)
    function = machine_code.parse(text, ["sums"])["sums"]
    _, path = function.loop_through({"LDG": 1}, "LDG")
    assert (path.count("LDG"), path.count("FFMA")) == (1, 1)
    assert path.lane_bytes == {"ldg": 4}
    monkeypatch.setattr(nvrtc, "_compiled", None)  # the next call must not compile
    assert nvrtc.disassembly(PLANTED, options) == text


def test_a_missing_nvdisasm_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    nvrtc.folder_with.cache_clear()
    with pytest.raises(FileNotFoundError, match="no nvdisasm: looked in"):
        nvrtc.folder_with("bin", "nvdisasm")
    nvrtc.folder_with.cache_clear()
