"""Errors are one short line that every terminal can show."""

import errno
import io

import pytest
from command_line import save

from qm_cupy.cli.main import main
from qm_cupy.cli.output import discard, one_line, print_error, print_summary


def system(number, text, *files):
    return OSError(number, text, *files)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ValueError("`budget` must be 1"), "`budget` must be 1"),
        (ValueError("  two\nlines\t "), r"two\nlines"),
        (ValueError("a\x1b[31mred\x9b0m"), r"a\x1b[31mred\x9b0m"),
        (ValueError("a\u2028b\u2029c\x85d"), r"a\u2028b\u2029c\x85d"),
        (ValueError("\u202ezpn.a\u2069"), r"\u202ezpn.a\u2069"),  # reversed text
        (ValueError("a\u200bb\xa0c\ufeff"), r"a\u200bb\xa0c\ufeff"),  # not visible
        (ValueError("\udcff\ud800"), r"\udcff\ud800"),  # not valid UTF-8
        (ValueError("é→中 😀"), "é→中 😀"),  # printable
        (ValueError(r"C:\new"), r"C:\new"),
        (system(errno.ENOENT, "No such file", "a\nb"), r"a\nb: No such file"),
        (system(errno.ENOENT, "No such file", b"a\xff"), r"a\udcff: No such file"),
        (system(errno.EXDEV, "Other disk", "a", None, "b"), "a -> b: Other disk"),
        (system(errno.EBADF, "Bad descriptor", 7), "7: Bad descriptor"),
        (system(errno.ENOSPC, "Disk full"), "Disk full"),  # without "[Errno 28]"
        (OSError("damaged"), "damaged"),
        (OSError(), "OSError"),
        (MemoryError(), "not enough memory"),
        (MemoryError("no 8 GiB"), "no 8 GiB"),
        (TimeoutError(), "TimeoutError"),
        (OverflowError("too large"), "too large"),
    ],
)
def test_one_line(error, wanted):
    assert one_line(error, "utf-8") == wanted


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [
        ("utf-8", "é→ \\n"),
        ("cp1252", r"é\u2192 \n"),
        ("ascii", r"\xe9\u2192 \n"),
        (None, "é→ \\n"),
    ],
)
def test_characters_that_an_encoding_lacks(encoding, wanted):
    assert one_line(ValueError("é→ \n."), encoding) == f"{wanted}."
    assert one_line(OSError(2, "No", "é→ \n."), encoding) == f"{wanted}.: No"


PATH = f"/first/{'directory/' * 60}last.npy"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            system(2, "No such file", PATH),
            ["/first/", "...", "/last.npy: No such file"],
        ),
        (
            system(18, "Other disk", PATH, None, PATH),
            ["/first/", "...", "/last.npy -> /first/", "...", "/last.npy: Other disk"],
        ),
        # The words around the path are whole.
        (
            ValueError(f"the input {PATH} is a folder: give the name of a file"),
            [
                "the input /first/",
                "...",
                "/last.npy is a folder: give the name of a file",
            ],
        ),
        (
            ValueError(f"`{PATH}` and `{PATH[::-1]}` differ: run `qm-cupy doctor`"),
            ["`/first/", "...", "...", "` differ: run `qm-cupy doctor`"],
        ),
        # Escaped characters count too.
        (system(2, "No such file", "\x1b" * 200), [r"\x1b\x1b", "...", "No such file"]),
        # No long word: the beginning and the end remain.
        (
            ValueError(f"begins {'and goes on ' * 99}ends"),
            ["begins and", "...", "on ends"],
        ),
        (ValueError("x" * 100_000), ["xxx", "...", "xxx"]),
    ],
)
def test_long_messages(error, parts):
    text = one_line(error, "utf-8")
    assert len(f"qm-cupy: error: {text}\n") < 300
    assert len(text) > 150  # as much as there is room for
    rest = text
    for part in parts:  # in this order
        assert part in rest
        rest = rest.split(part, 1)[1]
    assert text.startswith(parts[0])
    assert text.endswith(parts[-1])


def test_a_message_of_the_largest_length():
    assert one_line(ValueError("x" * 280), "utf-8") == "x" * 280
    assert len(one_line(ValueError("x" * 281), "utf-8")) == 280


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["--noise-seed", "1" * 400 + "x"],
            ["noise-seed: '11", "...", "1x' is not an integer"],
        ),
        (["--noise-seed", "1" * 400], ["noise-seed", "11...11", "than 64 bits"]),
        (["--noise-seed", "1" * 5000], ["noise-seed", "11...11", "than 64 bits"]),
        (["--budget", "9" * 400], ["budget", "99...99", "has more than 64 bits"]),
        (["--budget", "9" * 400 + "x"], ["neither a number of tokens", "nor a ratio"]),
        (["--method", "x" * 4000], ["invalid choice", "xx...xx"]),
        (["--weights=mass", "--temperature", "1" * 5000], ["temperature", "inf"]),
        (["y" * 4000], ["unrecognized arguments", "yy...yy"]),
        (["a\nb\x1b[31m"], [r"unrecognized arguments: a\nb\x1b[31m"]),
    ],
)
def test_wrong_arguments(tmp_path, tokens, fails, capsys, words, parts):
    source = save(tmp_path / "a.npy", tokens=tokens)
    output = tmp_path / "out.npz"
    argv = ["compress", str(source), "--budget", "3", "-o", str(output), *words]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert len(error) < 300
    for part in parts:
        assert part in error
    fails(argv)


def test_a_wrong_command(fails):
    fails(["z" * 4000], "invalid choice: 'zz", "zz...zz")


@pytest.fixture
def doctor_raises(monkeypatch):
    """Replace the work of a command by an error."""

    def replace(error):
        def fail(arguments):
            raise error

        monkeypatch.setattr(
            "qm_cupy.cli.doctor.add_arguments", lambda x: x.set_defaults(run=fail)
        )

    return replace


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, KeyError, RecursionError, AssertionError]
)
def test_errors_that_are_defects_keep_their_traceback(doctor_raises, error):
    doctor_raises(error)
    with pytest.raises(error):
        main(["doctor"])


@pytest.mark.parametrize("error", [OverflowError, MemoryError, UnicodeError, OSError])
def test_errors_of_the_input(doctor_raises, capsys, error):
    doctor_raises(error("a reason"))
    assert main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "qm-cupy: error: a reason\n")


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_streams_that_cannot_be_written(monkeypatch):
    """See `test_process.py` for real ones. These have no descriptor."""
    monkeypatch.setattr("sys.stdout", Full())
    monkeypatch.setattr("sys.stderr", Full())
    print_summary("text")
    print_error("text")
    discard(Full())


def test_output(capsys):
    print_summary("a summary")
    print_error("an error")
    assert capsys.readouterr() == ("a summary\n", "qm-cupy: an error\n")
