"""Compilation and launches of kernels without CuPy: sources, arguments and errors."""

import math
import re
import sys
import types

import ml_dtypes
import numpy as np
import ptx
import pytest
from seam import cuda

import qm_cupy as qm
from qm_cupy import install_advice


def test_kernels_are_selected_for_a_block_or_until_changed():
    assert cuda.implementation() == "optimized"
    with qm.use_kernels("basic"):
        with qm.use_kernels("optimized"):
            assert cuda.implementation() == "optimized"
        assert cuda.implementation() == "basic"
    # Without `with` the setting stays until it is changed.
    choice = qm.use_kernels("basic")
    assert cuda.implementation() == "basic"
    choice.__exit__()
    assert cuda.implementation() == "optimized"
    with pytest.raises(ValueError, match='"basic" or "optimized", got \'fast\''):
        qm.use_kernels("fast")


def test_tf32_is_allowed_for_a_block_or_until_changed():
    # Only optimized kernels of float32 change: indices 4 and 5 are theirs.
    plain = ["float16", "float32", "float64"] * 2
    allowed = [*plain[:4], "tf32", "float64"]
    files = ["basic/saliency"] * 3 + ["optimized/saliency"] * 3

    def dtypes():
        return [*map(cuda.kernel_dtype, files, plain)]

    assert dtypes() == plain
    with qm.allow_tf32():
        assert dtypes() == allowed
        with qm.allow_tf32(False):
            assert dtypes() == plain
        assert dtypes() == allowed
    choice = qm.allow_tf32()
    assert dtypes() == allowed
    choice.__exit__()
    assert dtypes() == plain
    with pytest.raises(TypeError, match="`enabled` must be True or False, got 1"):
        qm.allow_tf32(1)


def test_the_compiler_gets_a_tf32_macro():
    assert {"-Dreal_t=float", "-Dacc_t=float", "-DTF32=1"} < {*cuda.options("tf32")}
    assert "-DTF32=0" in cuda.options("float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shared_numbers_reach_the_kernels(dtype):
    width = 8 if dtype == "float64" else 4  # bytes of the accumulation dtype
    macros = [x for x in cuda.options(dtype) if not x.startswith(("--std", "-DTF32"))]
    names = dict(x.removeprefix("-D").split("=") for x in macros)
    assert names.pop("real_t") == names.pop("acc_t") == cuda._STORAGE[dtype]
    numbers = cuda.definitions(width)
    assert names == {name: str(number) for name, number in numbers.items()}
    # A number that no kernel reads is either misspelled or no longer needed.
    text = "".join(map(cuda.source, cuda.kernel_files()))
    read = {name for name in numbers if re.search(rf"\b{name}\b", text)}
    assert numbers.keys() == read
    assert numbers["LINKAGE_THREADS"] == cuda.LINKAGE_THREADS[width]


# With #line an error message names the file, not a line of the spliced text.
@pytest.mark.parametrize("file", cuda.kernel_files())
def test_source_names_its_files_and_kernels(file):
    text = cuda.source(file)
    assert text.startswith('#line 1 "common.cuh"\n')
    assert f'#line 1 "{file}.cu"\n' in text
    assert cuda.kernel_names(file)
    assert text.count("__global__ void") == len(cuda.kernel_names(file))


def test_the_package_comes_before_the_repository(tmp_path, monkeypatch):
    # An installed package has its own kernels; a checkout
    # has them beside the package.
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    monkeypatch.setattr(cuda, "_FOLDERS", (first, second))
    with pytest.raises(FileNotFoundError, match=r"common\.cuh"):
        cuda._folder.__wrapped__()
    (second / "common.cuh").touch()  # the folder alone is not enough
    assert cuda._folder.__wrapped__() == second
    (first / "common.cuh").touch()
    assert cuda._folder.__wrapped__() == first


def at(address, shape, strides, itemsize=4):
    """Return a stand-in for a CuPy array that has only bounds in memory."""
    return types.SimpleNamespace(
        data=types.SimpleNamespace(ptr=address),
        **{"shape": shape, "strides": strides, "itemsize": itemsize},
        size=math.prod(shape),
    )


# x covers the bytes 1000 to 1040. The comments give the bytes of y.
# Arrays of CuPy have no owner to compare, so addresses decide.
@pytest.mark.parametrize(
    ("y", "wanted"),
    [
        (at(1000, (10,), (4,)), True),
        (at(1036, (10,), (4,)), True),  # 1036 to 1076: the last element of x
        (at(1040, (10,), (4,)), False),  # begins where x ends
        (at(960, (10,), (4,)), False),  # 960 to 1000: ends where x begins
        (at(964, (10,), (4,)), True),
        (at(1076, (10,), (-4,)), False),  # 1040 to 1080, from the last to the first
        (at(1072, (10,), (-4,)), True),
        (at(900, (3, 2), (50, 4)), True),  # 900 to 1008
        (at(892, (3, 2), (50, 4)), False),  # 892 to 1000
        (at(1000, (0, 2), (8, 4)), False),  # no elements
    ],
)
def test_views_share_memory_by_their_addresses(y, wanted):
    x = at(1000, (10,), (4,))
    assert cuda.may_share_memory(x, y) is wanted
    assert cuda.may_share_memory(y, x) is wanted


@pytest.fixture
def launched(monkeypatch):
    """Record launches instead of compiling kernels: (key..., grid, block, args)."""
    calls = []

    def raw_kernel(*key):
        return lambda *call, **options: calls.append((*key, *call, options))

    monkeypatch.setattr(cuda, "raw_kernel", raw_kernel)
    return calls


def test_launch_casts_every_scalar(launched):
    x = np.zeros(3)
    args = (x, None, 3, True, 0.5, np.uint64(7))
    with qm.use_kernels("basic"):
        cuda.launch("merge_tokens", "merge_tokens", np.float16, args, outputs=257)
    [(*key, grid, block, arguments, options)] = launched
    assert key == ["basic/merge_tokens", "merge_tokens", "float16", False]
    assert options == {"shared_mem": 0}
    assert (grid, block) == ((2,), (256,))  # 257 outputs need two blocks
    assert arguments[0] is x
    # CuPy copies the bytes of an argument as they are, so each must have 8 of them.
    types_ = [np.uint64, np.int64, np.int64, np.float64, np.uint64]
    assert [type(a) for a in arguments[1:]] == types_
    assert arguments[1:] == (0, 3, 1, 0.5, 7)


# Up to sixteen counts fit one launch; 17 and 40 need two and three.
@pytest.mark.parametrize("batch", [1, 16, 17, 40])
def test_a_capture_takes_counts_as_arguments(batch, monkeypatch):
    """A graph cannot contain a copy from the CPU; each launch carries 16 counts."""
    ptx.install(monkeypatch)
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    monkeypatch.setattr(cuda, "to_device", None)  # a copy would fail
    wanted = np.arange(1, batch + 2)
    got, max_count = cuda.counts_on_device(wanted)
    assert max_count == batch + 1
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


def test_a_capture_belongs_to_the_current_stream_of_cupy(monkeypatch):
    assert not cuda.is_capturing()  # CuPy is not imported
    for answer in (True, False):
        stream = types.SimpleNamespace(is_capturing=lambda answer=answer: answer)
        fake = types.SimpleNamespace(get_current_stream=lambda stream=stream: stream)
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=fake))
        assert cuda.is_capturing() is answer


# CUDA refuses a grid without blocks; a kernel cannot see strides.
def test_launch_skips_empty_work_and_refuses_strides(launched):
    kernel = "merge_tokens", "merge_tokens", np.float32
    cuda.launch(*kernel, (), outputs=0)
    assert launched == []
    with pytest.raises(ValueError, match="C-contiguous"):
        cuda.launch(*kernel, (np.zeros((4, 4))[:, 0],), outputs=1)


ROWS = np.zeros((5, 3, 70), np.float16)  # 140 bytes a row: nine vectors of 16 bytes


@pytest.mark.parametrize(
    ("kernels", "work", "grid", "block"),
    [
        # The basic kernels have one thread per output, row, block or element, in
        # blocks of 256: 257 make two blocks.
        ("basic", {"outputs": 257}, 2, 256),
        ("basic", {"rows": 257}, 2, 256),
        ("basic", {"blocks": 257, "block": 64, "shared": 100}, 2, 256),
        ("basic", {"outputs": 257, "blocks": 9}, 2, 256),
        ("basic", {"outputs": 257, "threads": 9}, 2, 256),
        ("basic", {"threads": 257}, 2, 256),
        ("basic", {"vector_output": ROWS}, 5, 256),  # 5 * 3 * 70 = 1050
        ("optimized", {"outputs": 257}, 2, 256),
        # 257 warps, eight in each block of 256 threads: 33 blocks.
        ("optimized", {"rows": 257}, 33, 256),
        ("optimized", {"blocks": 257, "block": 64}, 257, 64),
        ("optimized", {"outputs": 257, "blocks": 9}, 9, 256),
        ("optimized", {"outputs": 257, "rows": 9}, 2, 256),
        ("optimized", {"outputs": 257, "threads": 600}, 3, 256),
        # 5 * 3 * 9 = 135 vectors, one thread each, fit in one block.
        ("optimized", {"vector_output": ROWS}, 1, 256),
    ],
)
def test_work_becomes_a_grid(kernels, work, grid, block, launched):
    with qm.use_kernels(kernels):
        cuda.launch("groups", "group_sizes", np.float32, (), **work)
    [(file, *_, blocks, threads, _, options)] = launched
    assert file == f"{kernels}/groups"
    assert (blocks, threads) == ((grid,), (block,))
    assert options == {"shared_mem": 0}


# The fastest shape depends on the number of multiprocessors: 20 here.
@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_tiles_become_blocks_of_the_fastest_shape(kernels, launched, monkeypatch):
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(20, 48 << 10))
    tiling = cuda.Tiling(2, 300, 200)
    # Whole tiles of this size make 12 blocks, half tiles 20:
    # one for each multiprocessor.
    half = tiling.blocks(cuda.HALF)
    for shape, name, blocks, threads in (
        (None, "linear_half", 20, 128),
        (cuda.WHOLE, "linear", 12, 256),
        (cuda.HALF._replace(suffix="_kept"), "linear_kept", half, 128),
    ):
        launched.clear()
        work = {"outputs": 257, "tiles": tiling, "shape": shape}
        with qm.use_kernels(kernels):
            cuda.launch("linear", "linear", np.float32, (), **work)
        [(file, kernel, *_, grid, block, _, options)] = launched
        if kernels == "basic":  # shapes do not matter: 257 outputs, a thread each
            name, blocks, threads = "linear", 2, 256
        assert (file, kernel) == (f"{kernels}/linear", name)
        assert (grid, block) == ((blocks,), (threads,))
        assert options == {"shared_mem": 0}


def test_kernels_that_exist_once_are_basic(launched):
    # These two kernels exist only in `kernels/basic`.
    for kernels in "basic", "optimized":
        with qm.use_kernels(kernels):
            cuda.launch("labels", "group_ends", np.float32, (), outputs=1)
            cuda.launch("saliency_mass", "saliency_mass", np.float32, (), outputs=1)
    assert {call[0] for call in launched} == {"basic/labels", "basic/saliency_mass"}


# A launch can name its kernels, whatever the setting is.
def test_kernels_can_be_named_for_one_launch(launched):
    kernel = "gumbel_softmax", "perturbed_scores", np.float32
    for wanted, kernels in (("optimized", None), ("basic", "basic")):
        launched.clear()
        cuda.launch(*kernel, (), outputs=1, blocks=1, kernels=kernels)
        assert [call[0] for call in launched] == [f"{wanted}/gumbel_softmax"]


def test_launch_asks_for_much_shared_memory(monkeypatch):
    recorded = types.SimpleNamespace()

    class Kernel:
        shared_size_bytes = 400

        def __call__(self, *call, shared_mem):
            recorded.bytes = shared_mem

    run = Kernel()
    monkeypatch.setattr(cuda, "raw_kernel", lambda *key: run)
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(1, 200 << 10))
    limit = (48 << 10) - 400  # without the static part
    # One byte above the default: the attribute gets the
    # device's limit, not this size.
    for size, asked in ((limit, None), (limit + 1, (200 << 10) - 400)):
        cuda.launch("groups", "sort_members", np.float32, (), blocks=1, shared=size)
        assert recorded.bytes == size
        assert getattr(run, "max_dynamic_shared_size_bytes", None) == asked


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_warmup_compiles_every_kernel(dtype, monkeypatch):
    seen = set()
    monkeypatch.setattr(cuda, "raw_kernel", lambda *key: seen.add(key))
    cuda.warmup(dtype)
    name = np.dtype(dtype).name
    # A 16-bit input needs kernels of its own dtype and of float32 for sums. A float64
    # input needs float32 as well: kernels without floats are launched as float32.
    wanted = {
        (file, kernel, name_of_dtype)
        for file in cuda.kernel_files()
        for kernel in cuda.kernel_names(file)
        for name_of_dtype in (name, "float32")
    }
    cooperative = {key for key in seen if key[3:] == (True,)}
    assert {key[1] for key in cooperative} == {"linkage", "single_linkage"}
    assert seen - cooperative == wanted
    with pytest.raises(TypeError, match="int32"):
        cuda.warmup(np.int32)


def test_a_compilation_error_gives_its_reason(monkeypatch):
    """Replaces CuPy by one whose compiler fails as the real one does."""

    class CompileException(Exception):  # noqa: N818 (CuPy's name)
        pass

    class RawModule:
        def __init__(self, *, code, options, enable_cooperative_groups):
            assert "--std=c++17" in options
            assert "common.cuh" in code

        def get_function(self, name):
            raise CompileException('catastrophic error: cannot open source file "x.h"')

    cupy = types.ModuleType("cupy")
    compiler = types.SimpleNamespace(CompileException=CompileException)
    runtime = types.SimpleNamespace(getDevice=lambda: 0)
    cupy.cuda = types.SimpleNamespace(compiler=compiler, runtime=runtime)
    cupy.RawModule = RawModule
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(cuda.KernelCompilationError) as caught:
        cuda.raw_kernel("basic/merge_tokens", "merge_tokens", "float32")
    message = str(caught.value)
    assert "`merge_tokens` of basic/merge_tokens.cu" in message
    assert "cannot open source file" in message
    assert "Hint: the CUDA headers are missing" in message
    assert install_advice.cupy_command() in message
    # Otherwise later tests would get the module of this stand-in.
    cuda._module.cache_clear()
