"""The arguments of the program: its commands and their options."""

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from .output import flush_output

# Each command is a module of the same name. Its function `add_arguments` adds the
# options, and stores the function that runs the command as the parser's default `run`.
_COMMANDS = {
    "compress": "merge the tokens of a file and write the result to a .npz file",
    "demo": "merge the patches of a picture and draw the result",
    "doctor": "show which packages and GPUs are available, and how to install others",
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
    return parser.parse_args(words)
