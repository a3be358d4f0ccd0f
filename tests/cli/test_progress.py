"""The progress bar of the command line."""

import io
import sys

from command_line import compress, save

from qm_cupy.cli import compress as command
from qm_cupy.cli import progress


def test_progress_on_a_terminal_only(tmp_path, tokens, monkeypatch, capsys):
    """In a file or a pipe, the characters that rewrite a line would be noise."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path)
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0)  # show the bar at once
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(command, "CHUNK_BYTES", 1)  # one step for each sequence
    compress(path)
    # Each state starts with a return to column 1 and a command to clear the line.
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1] == f"[{'.' * 30}] 0 of 7 sequences"
    assert shown[-2].startswith(f"[{'#' * 30}] 7 of 7 sequences, 0 s left")
    assert shown[-1] == ""  # nothing stays on the line
