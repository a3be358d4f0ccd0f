"""The command line: merge a file of tokens, run a demonstration, check the setup."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__

# Each command is a module of the same name. Its function `add_arguments` adds the
# options, and stores the function that runs the command as the parser's default `run`.
_COMMANDS = {
    "compress": "merge the tokens of a file and write the result to a file",
    "info": "show what is in a file, and what compress would do with it",
    "demo": "merge the patches of a picture and draw the result",
    "doctor": "show which packages and GPUs are available, and how to install others",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0 after success, 2 after an error, which is printed on one line, and 130 after
    an interrupt.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(words).parse_args(words)
        arguments.run(arguments)  # the command's function, from `add_arguments`
    except KeyboardInterrupt:
        print("qm-cupy: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
    # Errors that the user's input or machine causes. All other errors are probably
    # defects of the library and keep their traceback.
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"qm-cupy: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    """Return the message of an error without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without "[Errno 2]"
    # A MemoryError of Python has an empty message.
    return " ".join(str(error).split()) or "not enough memory"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors `main` prints on one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # argparse itself would print several lines and exit


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for the arguments `words`.

    Only the module of the command in `words` is imported.
    """
    parser = _Parser(
        prog="qm-cupy", description="Merge token sequences into shorter sequences."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in words:  # `qm-cupy --help` imports no command
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
    return parser
