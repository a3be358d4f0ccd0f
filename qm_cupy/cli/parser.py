"""The arguments of the program: its commands and their options."""

import argparse
import importlib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from .. import __version__
from .output import flush_output

# Each command is a module of the same name. Its function `add_arguments` adds the
# options, and stores the function that runs the command as the parser's default `run`.
COMMANDS = {
    "compress": "merge the tokens of a file and write the result to a file",
    "info": "show what is in a file, and what compress would do with it",
    "demo": "merge the patches of a picture and draw the result",
    "doctor": "show which packages and GPUs are available, and how to install others",
    "completion": "print a script for a shell, which then completes commands",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors `main` prints on one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # argparse itself would print several lines and exit

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush_output()  # `--help` to a full disk is an error, like every other output
        super().exit(status, message)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments in `words`, with the command's function as `run`.

    Only the module of the command in `words` is imported.
    """
    # `qm-cupy --help` imports no command.
    return build_parser(name for name in COMMANDS if name in words).parse_args(words)


def build_parser(names: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser that has the options of the commands with these names."""
    names = set(names)
    parser = _Parser(
        prog="qm-cupy", description="Merge token sequences into shorter sequences."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in names:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
    return parser
