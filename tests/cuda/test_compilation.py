"""Every kernel file compiles for every architecture; no GPU is needed."""

import itertools

import nvrtc
import pytest
from card_device import facts_of
from seam import cuda

ARCHITECTURES = (75, 80, 90)
# These have the instructions of an older architecture, so one dtype is enough.
BETWEEN = (86, 89, 100, 120)
DTYPES = ("float16", "bfloat16", "float32", "float64")

FILES = cuda.kernel_files()
# The files with matrix products, which also have a TF32 variant.
TILED = [file for file in FILES if "multiply_" in cuda.text(file)]
# NVRTC takes seconds for a file, so the full product would take too long.
CASES = [
    *itertools.product(FILES, DTYPES, ARCHITECTURES),
    *itertools.product(FILES, ["float16"], BETWEEN),
    *itertools.product(TILED, ["tf32"], ARCHITECTURES),
]


@pytest.mark.machine_code
@pytest.mark.parametrize(("file", "dtype", "arch"), CASES)
def test_kernels_compile_and_do_not_spill(file, dtype, arch):
    """A spill moves registers to memory, which makes a kernel slow without an error."""
    facts = facts_of(file, dtype, arch)
    assert set(facts) >= set(cuda.kernel_names(file))  # no kernel is missing
    assert {name: x.spilled for name, x in facts.items() if x.spilled} == {}


def test_the_index_of_a_thread_has_64_bits():
    """Only 2**32 threads overflow an index of 32 bits, and no test can launch so many.

    So the test looks for the multiplication with a product of 64 bits.
    """
    kernel = 'extern "C" __global__ void f(long long* x) { *x = thread_index(); }'
    options = (*cuda.options("float32"), "-arch=sm_80")
    source = (cuda._folder() / "common.cuh").read_text(encoding="utf-8")
    _, ptx = nvrtc.compile_source(source + kernel, options)
    assert "mul.wide.u32" in ptx


@pytest.mark.parametrize("file", ["common.cuh", "basic/merge_tokens.cu"])
def test_an_error_names_its_own_file(file):
    """The loader splices files together; an error must not name the spliced text."""
    source = cuda.source("basic/merge_tokens")
    marker = {
        "common.cuh": "constexpr float MASKED_SCORE",
        "basic/merge_tokens.cu": 'extern "C"',
    }
    # Plant an unknown type in one of the two files.
    broken = source.replace(marker[file], "no_such_type x;\n" + marker[file], 1)
    with pytest.raises(RuntimeError, match=rf"{file}\(\d+\): error"):
        nvrtc.kernel_facts(broken, (*cuda.options("float32"), "-arch=sm_80"))


def test_an_empty_log_changes_nothing_else():
    """Python keeps one object for each bytes of length 1, here b" ".

    NVRTC once wrote the 0 of an empty log into it: every b" " of the process changed.
    """
    source = 'extern "C" __global__ void silent() {}'
    log, text = nvrtc.run_nvrtc(source, ("-arch=compute_80",))
    assert log == ""
    assert ".entry silent" in text
    # Computed now: Python's compiler would store a literal when it reads this file.
    spaces = [b" " * count for count in (1, 2)]
    assert list(map(list, spaces)) == [[32], [32, 32]]
