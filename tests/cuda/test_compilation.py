"""Every kernel file compiles for every architecture; no GPU is needed."""

import itertools

import nvrtc
import pytest
from card_device import facts_of
from seam import cuda

ARCHITECTURES = (75, 80, 90)
BETWEEN = (86, 89, 100, 120)  # which have their elders' instructions: in one dtype
DTYPES = ("float16", "bfloat16", "float32", "float64")

FILES = cuda.kernel_files()
TILED = [file for file in FILES if "multiply_" in cuda.text(file)]
CASES = [
    *itertools.product(FILES, DTYPES, ARCHITECTURES),
    *itertools.product(FILES, ["float16"], BETWEEN),
    *itertools.product(TILED, ["tf32"], ARCHITECTURES),
]


@pytest.mark.machine_code
@pytest.mark.parametrize(("file", "dtype", "arch"), CASES)
def test_kernels_compile_and_do_not_spill(file, dtype, arch):
    found = facts_of(file, dtype, arch)
    assert set(found) >= set(cuda.kernel_names(file))
    assert {name: x.spilled for name, x in found.items() if x.spilled} == {}


def test_the_index_of_a_thread_has_64_bits():
    """No test can launch the 2**32 threads from which on 32 bits would not do."""
    kernel = 'extern "C" __global__ void f(long long* x) { *x = thread_index(); }'
    options = (*cuda.options("float32"), "-arch=sm_80")
    source = (cuda._folder() / "common.cuh").read_text(encoding="utf-8")
    _, ptx = nvrtc.compile_source(source + kernel, options)
    assert "mul.wide.u32" in ptx


@pytest.mark.parametrize("place", ["common.cuh", "basic/merge_tokens.cu"])
def test_an_error_names_its_own_file(place):
    source = cuda.source("basic/merge_tokens")
    marker = {
        "common.cuh": "constexpr float MASKED_SCORE",
        "basic/merge_tokens.cu": 'extern "C"',
    }
    broken = source.replace(marker[place], "no_such_type x;\n" + marker[place], 1)
    with pytest.raises(RuntimeError, match=rf"{place}\(\d+\): error"):
        nvrtc.kernel_facts(broken, (*cuda.options("float32"), "-arch=sm_80"))


def test_an_empty_log_changes_nothing_else():
    source = 'extern "C" __global__ void silent() {}'
    log, text = nvrtc.run_nvrtc(source, ("-arch=compute_80",))
    assert log == ""
    assert ".entry silent" in text
    spaces = [b" " * count for count in (1, 2)]  # found now, not by Python's compiler
    assert list(map(list, spaces)) == [[32], [32, 32]]  # NVRTC once wrote its 0 there
