"""Every kernel file compiles for every architecture; no GPU is needed."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator import nvrtc

from qm_cupy import _cuda

ARCHITECTURES = (75, 80, 90, 120)
BETWEEN = (86, 89, 100)  # which have their elders' instructions: in one dtype
DTYPES = ("float16", "bfloat16", "float32", "float64")
_SPILL = re.compile(r"Function properties for (\w+)\n.*?(\d+) bytes spill stores")

FILES = _cuda.kernel_files()
TILED = [file for file in FILES if "multiply_tiles(" in _cuda.text(file)]
CASES = [
    *itertools.product(FILES, DTYPES, ARCHITECTURES),
    *itertools.product(FILES, ["float16"], BETWEEN),
    *itertools.product(TILED, ["tf32"], ARCHITECTURES),
]


@pytest.fixture(scope="module")
def logs():
    """Futures of all logs: NVRTC lets go of the interpreter while it compiles."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (file, dtype, arch): pool.submit(
                nvrtc.compile_log,
                _cuda.source(file),
                [*_cuda.options(dtype), f"-arch=sm_{arch}"],
            )
            for file, dtype, arch in CASES
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("file", "dtype", "arch"), CASES)
def test_kernels_compile_and_do_not_spill(file, dtype, arch, logs):
    spills = dict(_SPILL.findall(logs[file, dtype, arch].result()))
    assert set(spills) >= set(_cuda.kernel_names(file))
    assert {name: int(size) for name, size in spills.items() if int(size)} == {}


@pytest.mark.parametrize("place", ["common.cuh", "basic/merging.cu"])
def test_an_error_names_its_own_file(place):
    source = _cuda.source("basic/merging")
    marker = {"common.cuh": "constexpr float NEVER", "basic/merging.cu": 'extern "C"'}
    broken = source.replace(marker[place], "no_such_type x;\n" + marker[place], 1)
    with pytest.raises(RuntimeError, match=rf"{place}\(\d+\): error"):
        nvrtc.compile_log(broken, [*_cuda.options("float32"), "-arch=sm_80"])
