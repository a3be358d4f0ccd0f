"""The program `qm-cupy`: it runs a command, prints its errors, and returns a status."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0 after success, 2 after an error, which is printed on one line, and 130 after
    an interrupt. If standard output is a pipe that is no longer read, as after
    ``| head``, the command ends early with 0. Without `argv`, this function takes over
    the streams and signals of the process (`program.py`).
    """
    # Everything is imported inside the `try`, so that an interrupt of an import ends
    # like any other. NumPy alone takes a fifth of a second.
    try:
        from .program import process

        if argv is not None:
            return _run(argv)
        with process():
            return _run(sys.argv[1:])
    except KeyboardInterrupt:  # during the imports; `_run` prints all others
        return 130


def _run(words: Sequence[str]) -> int:
    """Run the command in `words` and return the exit status."""
    from .output import flush_output, one_line, print_error, reader_has_gone

    try:
        from .parser import parse

        arguments = parse(words)
        arguments.run(arguments)  # the command's function, from `add_arguments`
        flush_output()  # here, so that an error is printed like the others
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130  # 128 + SIGINT, as shells report it
    # Errors that the user's input or machine causes. All other errors are probably
    # defects of the library and keep their traceback. A number that is too large for a
    # C type or a float raises an OverflowError.
    except (
        ValueError, TypeError, OSError, ImportError, MemoryError, OverflowError,
    ) as error:  # fmt: skip
        if isinstance(error, BrokenPipeError) and reader_has_gone():
            return 0
        print_error(f"error: {one_line(error, sys.stderr.encoding)}")
        return 2
    return 0
