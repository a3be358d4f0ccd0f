"""What users install: the wheel, the sdist, and the cost of an import."""

import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*command, cwd):
    """Return the standard output of a command; fail with its output if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, folder):
    # Without build isolation the network is not needed.
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(sys.executable, *PIP, "wheel", *options, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_contains_the_package_and_its_kernels(wheel):
    names = names_in(wheel)
    kernels = {f"qm_cupy/{p.relative_to(ROOT)}" for p in ROOT.glob("kernels/**/*.cu*")}
    modules = {f"{p.relative_to(ROOT)}" for p in ROOT.glob("qm_cupy/**/*.py")}
    assert "qm_cupy/kernels/common.cuh" in kernels
    assert kernels | modules | {"qm_cupy/py.typed"} <= names
    # Only the package: no tests, no benchmarks.
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qm_cupy"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    # Someone who builds from the sdist must get the kernels too:
    # they lie outside the package.
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "sdist",
        "-d",
        tmp_path,
        cwd=ROOT,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (source / "kernels" / "common.cuh").is_file()
    assert names_in(build_wheel(source, tmp_path)) == names_in(wheel)


@pytest.mark.slow("makes an environment and installs into it")
def test_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    """Another folder and environment, so that nothing comes from the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, *PIP, "install", wheel, cwd=tmp_path)
    tokens = np.random.default_rng(0).standard_normal((3, 10, 4))
    np.save(tmp_path / "tokens.npy", tokens)
    words = ["compress", "tokens.npy", "--budget", "0.2", "-o", "merged.npz"]
    out = run(python.parent / "qm-cupy", *words, cwd=tmp_path)
    assert "3 x 10 x 4 float64 -> 3 x 2 x 4" in out  # 20 % of 10 tokens
    with np.load(tmp_path / "merged.npz") as merged:
        assert merged["tokens"].shape == (3, 2, 4)
    where = run(python, "-c", "import qm_cupy; print(qm_cupy.__file__)", cwd=tmp_path)
    kernels = Path(where.strip()).parent / "kernels"
    assert kernels.is_relative_to(tmp_path / "venv")
    assert (kernels / "common.cuh").is_file()
    # An optional package that is missing is reported with
    # the command that installs it.
    report = run(python, "-m", "qm_cupy", "doctor", cwd=tmp_path)
    assert 'pip install "safetensors>=' in report


IMPORT = """
import sys, time
start = time.perf_counter()
import numpy
started, before = time.perf_counter(), set(sys.modules)
import qm_cupy; qm_cupy.quickmerge  # the first use imports everything
ended, new = time.perf_counter(), set(sys.modules) - before
print((ended - started) / (started - start), *{name.split(".")[0] for name in new})
"""


def test_import_is_light(tmp_path, monkeypatch):
    """An import takes less time than NumPy's own: SciPy waits for its first use."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))  # the first run compiles
    _, *outputs = [
        run(sys.executable, "-c", IMPORT, cwd=tmp_path).split() for _ in range(6)
    ]
    own = {"qm_cupy", "numpy"}  # the only packages that it may need
    new = {name for output in outputs for name in output[1:]}
    assert new - own <= set(sys.stdlib_module_names)
    # The ratio to NumPy's time depends little on the
    # machine; the median little on noise.
    assert statistics.median(float(output[0]) for output in outputs) < 1


def test_import_leaves_the_command_line_alone(tmp_path):
    # An import of the package loads neither the command line nor the file readers.
    code = (
        "import sys, qm_cupy; qm_cupy.quickmerge; "
        "print(*(name for name in sys.modules if 'qm_cupy.' in name))"
    )
    names = set(run(sys.executable, "-c", code, cwd=tmp_path).split())
    assert "qm_cupy.arrays.checks" in names
    commands = {f"qm_cupy.cli.{x}" for x in ("main", "compress", "doctor", "demo")}
    assert not names & (commands | {"qm_cupy.corpus", "qm_cupy.plot"})
