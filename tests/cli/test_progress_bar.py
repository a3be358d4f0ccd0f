"""The progress bar of the command line."""

import io
import re
import sys

import pytest
from command_line import compress, save

from qm_cupy.cli import progress
from qm_cupy.corpus import plan


def as_terminal(monkeypatch):
    """Make the standard error a terminal, on which the bar appears at once.

    Not a fixture, because pytest replaces the standard error after it.
    """
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def percentages(stream):
    return [int(x) for x in re.findall(r"(\d+)%", stream.getvalue())]


def test_progress_on_a_terminal_only(tmp_path, tokens, capsys):
    """In a file or a pipe, the characters that rewrite a line would be noise."""
    path = save(tmp_path / "a.npy", tokens=tokens)
    compress(path)
    assert capsys.readouterr().err == ""


def test_many_sequences(tmp_path, tokens, monkeypatch):
    terminal = as_terminal(monkeypatch)
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)  # one sequence at a time
    compress(save(tmp_path / "a.npy", tokens=tokens))
    shown = percentages(terminal)
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert len(set(shown)) > 7  # each sequence, and within sequences
    assert "84.0/84.0" in terminal.getvalue()  # 7 sequences of 12 tokens
    # Nothing stays on the line: the last text are spaces over it.
    assert re.search(r"\r +\r$", terminal.getvalue())


@pytest.mark.parametrize(
    "options", [(), ("--method", "contiguous"), ("--weights", "saliency")]
)
def test_one_long_sequence(tmp_path, rng, monkeypatch, options):
    terminal = as_terminal(monkeypatch)
    path = save(tmp_path / "a.npy", tokens=rng.standard_normal((1500, 8)))
    compress(path, *options)
    shown = percentages(terminal)
    assert shown == sorted(shown)
    # The bar moves inside the sequence.
    assert len(set(shown)) >= 3


def test_an_error_removes_the_bar(tmp_path, tokens, monkeypatch):
    terminal = as_terminal(monkeypatch)
    tokens[6] = float("nan")
    compress(save(tmp_path / "a.npy", tokens=tokens))
    assert re.search(r"\r +\rqm-cupy: error: .*\n$", terminal.getvalue())


def test_without_tqdm(tmp_path, tokens, monkeypatch):
    terminal = as_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert compress(save(tmp_path / "a.npy", tokens=tokens))[0] == 0
    assert terminal.getvalue() == ""
