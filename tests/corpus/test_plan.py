"""The memory that `compress` may use: computed and compared before the work."""

import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import assert_same, compress, save

import qm_cupy as qm
from qm_cupy.corpus import plan

LIMIT = 10**9  # bytes


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        ((), "use --method contiguous or nearest, or cut it into windows"),
        (("--method", "contiguous"), "available: cut it into windows"),
    ],
)
def test_refused_before_the_work(
    tmp_path, rng, monkeypatch, compress_fails, options, way_out
):
    # The tokens are NaN: reading them would be another error.
    path = save(tmp_path / "a.npy", tokens=np.full((3000, 64), np.nan, np.float32))
    monkeypatch.setattr(plan, "available_bytes", lambda: 10**5)
    words = f"{path}: a sequence of 3,000 tokens needs 0."
    compress_fails(path, words, "only 0.0 GB are", way_out, options=options)


def test_fewer_sequences_at_a_time(tmp_path, rng, monkeypatch, capsys):
    """If memory is short, chunks are smaller, and the results are the same."""
    tokens = rng.standard_normal((40, 30, 8)).astype(np.float32)
    path = save(tmp_path / "a.npy", tokens=tokens)
    sizes = []
    merge = plan.Plan
    monkeypatch.setattr(plan, "Plan", lambda *x: sizes.append(x[4:6]) or merge(*x))
    monkeypatch.setattr(plan, "OTHER_BYTES", 0)
    for available in (None, 10**12, 180_000, 10**5):
        monkeypatch.setattr(plan, "available_bytes", lambda x=available: x)
        code, got = compress(path)
        if code == 0:
            assert_same(got, qm.quickmerge(tokens, 3))
    # All 40 sequences at once; then as many as the memory allows.
    assert [size for size, _ in sizes[:2]] == [40, 40]
    assert 1 <= sizes[2][0] < 40
    assert sizes[2][1] <= 180_000


def limited(*words, cwd):
    """Run the command with a limit of addresses, which a shell sets.

    Python could set it between fork and exec, but JAX, which other tests use, forbids
    code there.
    """
    argv = [sys.executable, "-m", "qm_cupy", *map(str, words)]
    return subprocess.run(
        ["sh", "-c", f'ulimit -v {LIMIT // 1024}; exec "$@"', "sh", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="Linux reports free memory")
class TestLimit:
    def test_a_sequence_that_is_too_long(self, tmp_path):
        path = tmp_path / "a.npy"
        np.lib.format.open_memmap(path, "w+", np.float32, (20_000, 16))
        start = time.perf_counter()
        done = limited("compress", path, "--budget", 10, "-o", "b.npz", cwd=tmp_path)
        assert done.returncode == 2
        assert "a sequence of 20,000 tokens needs 3." in done.stderr
        assert done.stderr.count("\n") == 1
        # The work alone would take longer than this, imports included.
        assert time.perf_counter() - start < 30
        assert [*tmp_path.iterdir()] == [path]

    @pytest.mark.slow("merges a file of 1.2 GB")
    @pytest.mark.parametrize("budget", ["--budget=0.1", "--max-error=0.5"])
    def test_a_file_larger_than_memory(self, tmp_path, rng, budget):
        path, shape = tmp_path / "a.npy", (4600, 64, 1024)
        tokens = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        # The file has holes, which read as zeros, and one sequence of numbers.
        tokens[4000] = rng.standard_normal((64, 1024))
        assert path.stat().st_size > LIMIT
        done = limited("compress", path, budget, "-o", "b.npz", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        with np.load(tmp_path / "b.npz") as got:
            name, value = budget.removeprefix("--").split("=")
            wanted = qm.quickmerge(
                tokens[4000], **{name.replace("-", "_"): float(value)}
            )
            num_groups = len(wanted.tokens)
            np.testing.assert_array_equal(got["labels"][4000], wanted.labels)
            got_tokens = got["tokens"][4000, :num_groups]
        np.testing.assert_array_equal(got_tokens, wanted.tokens)
