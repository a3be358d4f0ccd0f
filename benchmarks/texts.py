"""English that a machine has anyway: Python's language reference, and licences."""

import hashlib
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from itertools import islice
from typing import NamedTuple

import numpy as np
from minilm import CLS, SEP, MiniLM

_STOP = 1012  # the word piece of a full stop
_QUERY = 8, 60  # word pieces of a sentence that can be searched for
_LICENCE = ("LICENSE", "LICENCE", "COPYING", "NOTICE")  # how the files' names begin
_MOST = 100_000  # characters of a licence: some are of all that a program links


class Document(NamedTuple):
    """Word pieces of a title and of the text under it."""

    title: list[int]
    text: list[int]


class Section(NamedTuple):
    """A passage, and the sentence before it as a query."""

    query: np.ndarray  # (Q,): title and sentence, in [CLS] and [SEP]
    passage: np.ndarray  # (N,)


def documents(model: MiniLM, limit: int | None, least: int) -> list[Document]:
    """Return the topics, of the first `limit`, with `least` word pieces or more."""
    topics = sorted(pydoc_data.topics.topics.items())[:limit]
    return _read(model, topics, least)


def licences(model: MiniLM, limit: int | None, least: int) -> list[Document]:
    """Return licences of installed packages, as long as those; none of them twice."""
    return _read(model, islice(_licence_files(), limit), least)


def _licence_files() -> Iterator[tuple[str, str]]:
    """Give each licence's package and what no licence before it says."""
    known: set[bytes] = set()
    packages = {x.metadata["Name"]: x for x in distributions()}
    for name, package in sorted(packages.items()):
        for file in sorted(package.files or (), key=str):
            path = file.locate()
            if not file.name.upper().startswith(_LICENCE) or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")[:_MOST]
            new = []
            for paragraph in text.split("\n\n"):
                digest = hashlib.sha256("".join(paragraph.split()).lower().encode())
                if digest.digest() not in known:
                    new.append(paragraph)
                known.add(digest.digest())
            yield f"{name} licence", "\n\n".join(new)


def _read(
    model: MiniLM, texts: Iterable[tuple[str, str]], least: int
) -> list[Document]:
    found = []
    for title, text in texts:
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        lines = [p for p in paragraphs if p and "***" not in p and "===" not in p]
        pieces = model.word_pieces(" ".join(lines))
        if len(pieces) >= least:
            found.append(Document(model.word_pieces(title), pieces))
    return found


def cut(pieces: list[int], length: int) -> np.ndarray:
    """Cut word pieces into whole passages (P, length) in [CLS] and [SEP]."""
    inner = length - 2
    count = len(pieces) // inner
    rows = np.array(pieces[: count * inner], int).reshape(count, inner)
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))


def sections(document: Document, length: int, most: int) -> list[Section]:
    """Cut a document into up to `most` passages, a sentence before each as its query.

    Query and passage share no word piece's place: none contains its answer.
    """
    found: list[Section] = []
    pieces, inner = document.text, length - 2
    start = 0
    while len(found) < most and _STOP in pieces[start:]:
        stop = pieces.index(_STOP, start) + 1
        if _QUERY[0] <= stop - start <= _QUERY[1]:
            if len(pieces) < stop + inner:
                break
            query = [CLS, *document.title, *pieces[start:stop], SEP]
            passage = [CLS, *pieces[stop : stop + inner], SEP]
            found.append(Section(np.array(query), np.array(passage)))
            stop += inner
        start = stop
    return found
