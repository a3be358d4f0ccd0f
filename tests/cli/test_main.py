"""The command line as a program, its help and its errors."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from command_line import save

import qm_cupy
from qm_cupy.cli.main import main


def test_no_command_and_help(fails, capsys):
    fails([], "required: COMMAND")
    fails(["compress"], "required: INPUT, -o/--output")  # all that is missing
    fails(["compress", "a", "-o", "b"], "--budget --max-error --max-distance is req")
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    assert "--budget K" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{qm_cupy.__version__}\n"


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_command_is_imported_only_when_it_runs(tmp_path, option):
    """So that `--help` does not need the packages of the commands, nor their time."""
    # A new process: in this one, other tests have imported the modules.
    code = f"""
import sys
old = set(sys.modules)
from qm_cupy.cli.main import main
new = set(sys.modules) - old
# The others are imported where an interrupt is handled.
assert not new & set(["argparse", "signal", "threading", "pathlib"]), new
try:
    main(["{option}"])
finally:
    print(*sys.modules, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    names = set(done.stdout.split("\n"))  # all modules that were imported
    assert "qm_cupy.cli.main" in names
    for module in ("cli.compress", "cli.demo", "corpus", "files", "plot", "api"):
        assert f"qm_cupy.{module}" not in names
    assert "numpy" not in names  # it takes most of the time


# The installed script and `python -m qm_cupy` must behave alike.
@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sysconfig.get_path("scripts")) / "qm-cupy")],
        [sys.executable, "-m", "qm_cupy"],
    ],
    ids=["script", "module"],
)
def test_as_a_program(tmp_path, tokens, command):
    save(tmp_path / "a.npy", tokens=tokens)

    def run(*options):
        words = ["compress", "a.npy", "-o", "b.npz", *options]
        return subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("--budget", "0.25")  # 3 of 12 tokens
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 x 12 x 5 float32 -> 7 x 3 x 5 in" in done.stdout
    done = run("--budget", "99")  # an error is one line, and the exit status is 2
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qm-cupy: error: a.npy: `budget` must lie in 1..12 (its tokens), got 99\n"
    )
