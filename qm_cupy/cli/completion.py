"""The command `completion`: print a script that completes commands in a shell."""

import argparse

from ..install_advice import install_command
from .parser import COMMANDS, build_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option of `completion`: the shell."""
    parser.description = (
        "Print a script that lets a shell complete the commands and options of "
        'qm-cupy. In bash: eval "$(qm-cupy completion bash)"'
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> None:
    """Print the script of the shell."""
    try:
        import shtab
    except ImportError as error:
        message = f"shell completion needs shtab: {install_command('shtab')}"
        raise ImportError(message) from error
    parser = build_parser(COMMANDS)
    for command in _commands(parser):
        for action in command._actions:
            if action.dest in ("input", "output", "image"):
                # The attribute in which shtab looks for what to complete.
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands."""
    [commands] = [
        action
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return list(commands.choices.values())
