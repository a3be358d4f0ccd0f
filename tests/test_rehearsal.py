"""The stand-in for CuPy. Each test starts a process that imports it as `cupy`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qm_cupy as qm

pytestmark = pytest.mark.rehearsal

TESTS = Path(__file__).resolve().parent
# The stand-in comes first, so that it is found before a real CuPy.
PATH = os.pathsep.join(map(str, (TESTS / "rehearsal", TESTS, TESTS.parent)))

# A program that launches one kernel, `token_norms`, and does not wait for it.
CALL = """
import cupy, numpy as np, qm_cupy as qm
x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
result = qm.norm_saliency(cupy.asarray(x))
print("launched", flush=True)
"""


def started(*command, **planted):
    """Start a process; `planted` maps a fault such as HANG to its kernel."""
    faults = {f"QM_CUPY_REHEARSE_{name}": kernel for name, kernel in planted.items()}
    # _runtime.py reads these variables.
    environment = os.environ | {"PYTHONPATH": PATH} | faults
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=TESTS.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output(*command, **planted):
    """Return the output of a process, which must succeed."""
    process = started(*command, **planted)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def test_checks():
    """All tests of checks.py pass, and none is skipped."""
    folder = "tests/rehearsal"
    # Without tests/conftest.py, which leaves this folder out.
    command = "-m", "pytest", "-q", f"--confcutdir={folder}", f"{folder}/checks.py"
    text = output(*command)
    assert " passed" in text
    assert "skipped" not in text


def test_torch_and_jax_see_no_gpu():
    code = """
import cupy, torch, jax
assert cupy.is_available() and not torch.cuda.is_available()
assert jax.default_backend() == "cpu"
"""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    output("-c", code)


def test_a_planted_wrong_result_shows():
    code = CALL + "print(abs(result.get() - qm.norm_saliency(x)).max() > 0.1)"
    # Without a fault the interpreted kernel agrees with NumPy.
    assert output("-c", code).split() == ["launched", "False"]
    kernel = "token_norms"
    assert output("-c", code, WRONG=kernel).split() == ["launched", "True"]


def test_an_illegal_access_poisons_the_process():
    """The launch returns; the next wait fails, and every later CUDA call fails too."""
    code = (
        CALL
        + """
Error = cupy.cuda.runtime.CUDARuntimeError
calls = (
    cupy.cuda.get_current_stream().synchronize,
    result.get,
    lambda: cupy.zeros(3),
    cupy.cuda.runtime.getDevice,
    cupy.cuda.Event,
    cupy.cuda.Device().synchronize,
)
for call in calls:
    try:
        call()
    except Error as error:
        assert str(error) == (
            "cudaErrorIllegalAddress: an illegal memory access was encountered"
        )
        print("fails")
"""
    )
    assert output("-c", code).split() == ["launched"]
    words = output("-c", code, ILLEGAL="token_norms").split()
    assert words == ["launched", *["fails"] * 6]  # all six calls


def test_a_hang_cannot_be_interrupted():
    """As on a GPU: Ctrl-C does not end a wait inside the driver, but SIGKILL does."""
    process = started("-c", CALL + "result.get()\nprint('over')", HANG="token_norms")
    assert process.stdout.readline() == "launched\n"
    time.sleep(1)  # let the process reach the wait
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill()
    text, _ = process.communicate()
    assert text == ""  # neither "over" nor a traceback of KeyboardInterrupt


def test_compress_on_a_gpu(tmp_path):
    """The command gives the results of the CPU, with every array that a file may have.

    `--saliency norm` and positions of protected tokens need conversions of their own.
    """
    rng = np.random.default_rng(0)
    mask = np.arange(9) < np.array([[9], [6], [7]])
    attention = rng.random((3, 2, 9, 9)) * mask[:, None, None]
    attention /= attention.sum(-1, keepdims=True)
    np.savez(
        tmp_path / "a.npz",
        tokens=rng.standard_normal((3, 9, 4)).astype(np.float32),
        mask=mask,
        attention=attention.astype(np.float32),
        keep=mask & (np.arange(9) == 2),
    )
    cases = (
        ("--budget", "4", "--protect", "0,-1"),
        ("--budget", "0.5", "--protect", "keep", "--saliency", "norm"),
        ("--budget", "4", "--attention", "attention"),
        ("--max-error", "0.3"),
        ("--budget", "4", "--weights", "mass", "--noise-seed", "1"),
    )
    for options in cases:
        words = ["-m", "qm_cupy", "compress", str(tmp_path / "a.npz"), *options]
        results = []
        for device in ("cpu", "cuda"):
            path = tmp_path / f"{device}.npz"
            text = output(*words, "-o", str(path), "--device", device)
            assert ("on a GPU" in text) == (device == "cuda")
            results.append(qm.Merged.load(path))
        wanted, got = results
        np.testing.assert_array_equal(got.labels, wanted.labels)
        np.testing.assert_allclose(got.tokens, wanted.tokens, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.mass, wanted.mass, rtol=1e-4, atol=1e-5)
