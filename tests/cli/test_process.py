"""The program as a process: signals, closed and full streams, encodings."""

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import save

import qm_cupy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

ROOT = Path(qm_cupy.__file__).parent.parent
SCRIPT = [str(Path(sysconfig.get_path("scripts")) / "qm-cupy")]
MODULE = [sys.executable, "-m", "qm_cupy"]
# The installed script and `python -m qm_cupy` must behave alike.
BOTH = pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "module"])
COMPRESS = ["compress", "a.npy", "--budget", "3", "-o", "out.npz"]


def environment(**variables):
    # Without PYTHONPATH, an installed script could import another checkout.
    own = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": ""}
    return {**os.environ, **own, **variables}


def start(folder, command, *, first=(), **variables):
    """Start a command; in a new session, so that no signal reaches this process."""
    return subprocess.Popen(
        [*first, *command],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process):
    """Wait until the condition is true, while the process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def finish(process):
    """Return exit status, standard output and standard error."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def sh(folder, command, **variables):
    """Run a line of a shell; `qm-cupy` in it is the module."""
    program = " ".join(f"'{word}'" for word in MODULE)
    done = subprocess.run(
        ["sh", "-c", command.replace("qm-cupy", program)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def long_work(tmp_path, rng):
    """A folder with a file that takes seconds to merge, and with an earlier output."""
    tokens = rng.standard_normal((2000, 300, 4)).astype(np.float32)
    save(tmp_path / "a.npy", tokens=tokens)
    (tmp_path / "out.npz").write_bytes(b"old")
    return tmp_path


def assert_nothing_is_left(folder):
    assert {x.name for x in folder.iterdir()} == {"a.npy", "out.npz"}
    assert (folder / "out.npz").read_bytes() == b"old"


@pytest.fixture
def default_signals():
    """Let child processes start with the usual signals.

    A shell ignores SIGINT for programs in the background, and `nohup` ignores SIGHUP.
    """
    names = "SIGINT", "SIGTERM", "SIGHUP"
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {x: signal.getsignal(x) for x in numbers}
    for x in numbers:
        if before[x] == signal.SIG_IGN:  # a child inherits this, and no other handler
            signal.signal(x, signal.SIG_DFL)
    yield
    for x, handler in before.items():
        signal.signal(x, handler)


@pytest.mark.usefixtures("default_signals")
class TestSignals:
    @BOTH
    @pytest.mark.parametrize(
        ("name", "status", "message"),
        [
            ("SIGINT", 130, "qm-cupy: interrupted\n"),
            ("SIGTERM", 143, ""),
            ("SIGHUP", 129, ""),
        ],
    )
    def test_one_signal(self, long_work, program, name, status, message):
        process = start(long_work, [*program, *COMPRESS])
        wait_for(lambda: [*long_work.glob(".*.tmp")], process)
        process.send_signal(signal.Signals[name])
        assert finish(process) == (status, "", message)
        assert_nothing_is_left(long_work)

    @pytest.mark.parametrize("pause", [0, 0.002, 0.01])
    @pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
    def test_two_signals(self, long_work, second, pause):
        """The second one comes during the deletion, or shortly before or after it."""
        process = start(long_work, [*MODULE, *COMPRESS])
        wait_for(lambda: [*long_work.glob(".*.tmp")], process)
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        process.send_signal(signal.Signals[second])
        status, out, err = finish(process)
        # A signal that comes when the interpreter exits has its usual effect.
        number = signal.Signals[second]
        assert status in (143, 128 + number, -number)
        assert out == ""
        assert err in ("", "qm-cupy: interrupted\n")
        assert_nothing_is_left(long_work)

    def test_an_exception_that_is_lost(self, tmp_path):
        """Python ignores an exception in `__del__`: the second signal ends the work."""
        code = """
        import os, signal, sys, time
        from pathlib import Path
        from qm_cupy.atomic_write import atomic_write
        from qm_cupy.cli.program import process

        class Deaf:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

        with process(), atomic_write(Path("out.npz")):
            sys.unraisablehook = lambda error: print(error.exc_type.__name__)
            Deaf()
            print("goes on", len(list(Path().iterdir())), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        """
        process = start(tmp_path, [sys.executable, "-c", textwrap.dedent(code)])
        assert finish(process) == (143, "SystemExit\ngoes on 1\n", "")
        assert [*tmp_path.iterdir()] == []

    def test_a_signal_that_the_caller_ignores(self, long_work):
        """As under `nohup`: the work goes on after the terminal is closed."""
        process = start(long_work, [*MODULE, *COMPRESS], first=["nohup"])
        wait_for(lambda: [*long_work.glob(".*.tmp")], process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        assert process.poll() is None
        process.terminate()
        assert finish(process)[:2] == (143, "")
        assert_nothing_is_left(long_work)

    @BOTH
    @pytest.mark.parametrize(
        ("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]
    )
    def test_a_signal_during_the_imports(self, tmp_path, program, name, status):
        """A module named numpy is imported first. It waits, and ignores all errors."""
        code = """
        import pathlib, time
        try:
            pathlib.Path("ready").touch()
            time.sleep(50)
        except BaseException:
            time.sleep(50)
        """
        (tmp_path / "numpy.py").write_text(textwrap.dedent(code))
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        process = start(tmp_path, [*program, *COMPRESS], PYTHONPATH=path)
        wait_for((tmp_path / "ready").exists, process)
        process.send_signal(signal.Signals[name])
        got, out, err = finish(process)
        assert (got, out) == (status, "")
        assert err == ("qm-cupy: interrupted\n" if name == "SIGINT" else "")


class TestStreams:
    @pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}])
    @pytest.mark.parametrize("command", ["doctor", "--help", "--version"])
    @pytest.mark.parametrize("reader", ["true", "head -n 1"])
    def test_a_reader_that_goes(self, tmp_path, command, reader, variables):
        line = f"{{ qm-cupy {command}; echo $? >status; }} | {reader}"
        _, _, err = sh(tmp_path, line, **variables)
        assert ((tmp_path / "status").read_text(), err) == ("0\n", b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
    @pytest.mark.parametrize("command", ["doctor", "--help", "--version"])
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_a_full_disk(self, tmp_path, command, unbuffered):
        line = f"qm-cupy {command} >/dev/full"
        status, _, err = sh(tmp_path, line, PYTHONUNBUFFERED=unbuffered)
        assert status == 2
        assert err.startswith(b"qm-cupy: error: ")
        assert err.endswith(b"No space left on device\n")
        assert err.count(b"\n") == 1
        if not unbuffered:
            assert b"error: standard output: No" in err

    @pytest.mark.parametrize("closed", [">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
    def test_closed_streams(self, tmp_path, tokens, closed):
        save(tmp_path / "a.npy", tokens=tokens)
        status, out, err = sh(tmp_path, f"qm-cupy {' '.join(COMPRESS)} {closed}")
        assert (status, err) == (0, b"")
        assert bool(out) == (">&-" not in closed.split())
        assert len(qm_cupy.Merged.load(tmp_path / "out.npz").tokens) == 7
        # An error has the same status, although it cannot be printed.
        assert sh(tmp_path, f"qm-cupy doctor --no-such-option {closed}")[0] == 2

    def test_a_closed_stream_in_development_mode(self, tmp_path):
        """Python then reports files that are not closed."""
        got = sh(tmp_path, "qm-cupy --version >&-", PYTHONDEVMODE="1")
        assert got == (0, b"", b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
    @pytest.mark.parametrize("where", ["2>/dev/full", "2>&1 >/dev/null | true"])
    def test_an_error_that_cannot_be_printed(self, tmp_path, where):
        line = "{ qm-cupy compress missing.npy --budget 3 -o o.npz; echo $? >&3; }"
        got = sh(tmp_path, f"{line} 3>status {where}")
        assert got == (0, b"", b"")
        assert (tmp_path / "status").read_text() == "2\n"

    def test_a_pipe_that_is_not_standard_output(self, tmp_path):
        """The error of another pipe must not look like success."""
        code = """
        import os, sys
        from qm_cupy.cli import doctor, main

        def write(arguments):
            reader, writer = os.pipe()
            os.close(reader)
            os.write(writer, b"text")

        doctor.add_arguments = lambda parser: parser.set_defaults(run=write)
        sys.argv[1:] = ["doctor"]
        sys.exit(main.main())
        """
        process = start(tmp_path, [sys.executable, "-c", textwrap.dedent(code)])
        assert finish(process) == (2, "", "qm-cupy: error: Broken pipe\n")

    @pytest.mark.parametrize("stream", [">&-", ">/dev/full", "| true"])
    @pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}])
    def test_a_summary_is_not_needed(self, tmp_path, stream, variables):
        """The result is already in its file."""
        code = """
        import sys
        from qm_cupy.cli import doctor, main, output

        def run(arguments):
            output.print_summary("1000 tokens")
            output.print_summary("a second line")

        doctor.add_arguments = lambda parser: parser.set_defaults(run=run)
        sys.argv[1:] = ["doctor"]
        sys.exit(main.main())
        """
        (tmp_path / "code.py").write_text(textwrap.dedent(code))
        line = f"{{ '{sys.executable}' code.py; echo $? >&3; }} 3>status {stream}"
        assert sh(tmp_path, line, **variables) == (0, b"", b"")
        assert (tmp_path / "status").read_text() == "0\n"


class TestEncodings:
    @pytest.mark.parametrize(
        ("variables", "wanted"),
        [
            ({"PYTHONIOENCODING": "cp1252"}, b"/\xe9\\u2192\\udcff.npx"),
            ({"PYTHONIOENCODING": "ascii"}, b"/\\xe9\\u2192\\udcff.npx"),
            ({"PYTHONIOENCODING": "utf-8"}, "/é→\\udcff.npx".encode()),
            # Here Python cannot decode the name: each byte is escaped.
            (
                {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                b"/\\udcc3\\udca9\\udce2\\udc86\\udc92\\udcff.npx",
            ),
        ],
    )
    def test_names_that_cannot_be_printed(self, tmp_path, tokens, variables, wanted):
        """A result that was written is a success, whatever the terminal can show."""
        source = save(tmp_path / "a.npy", tokens=tokens)
        # é is in cp1252, → and the byte 0xff of a name are not.
        name = os.fsencode(tmp_path) + b"/\xc3\xa9\xe2\x86\x92\xff"
        source.rename(os.fsdecode(name) + ".npy")
        words = b"compress %b.npy --budget 3 -o %b.npz" % (name, name)
        done = subprocess.run(
            [*MODULE, *words.split(b" ")],
            env=environment(**variables),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert Path(os.fsdecode(name) + ".npz").exists()
        assert b".npy -> " in done.stdout
        done = subprocess.run(
            [*MODULE, *words.replace(b".npy", b".npx").split(b" ")],
            env=environment(**variables),
            capture_output=True,
            check=False,
        )
        assert wanted in done.stderr
        assert done.returncode == 2
        assert done.stderr.count(b"\n") == 1
