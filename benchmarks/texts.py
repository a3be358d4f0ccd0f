"""English text that is already installed: Python's language reference and licences."""

import hashlib
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from itertools import islice
from typing import NamedTuple

import numpy as np
from minilm import CLS, SEP, MiniLM

_STOP = 1012  # the word piece of a full stop
_QUERY = 8, 60  # least and largest number of word pieces of a query's sentence
_LICENCE = ("LICENSE", "LICENCE", "COPYING", "NOTICE")  # starts of file names
# Characters that are read of a licence. Some files hold the licences of everything that
# a program links.
_MAX_LICENCE = 100_000


class Document(NamedTuple):
    """The word pieces of a title, and of the text below it."""

    title: list[int]
    text: list[int]


class Section(NamedTuple):
    """A passage, and the sentence before it as a query."""

    query: np.ndarray  # (Q,): [CLS], title, sentence, [SEP]
    passage: np.ndarray  # (N,): [CLS], text, [SEP]


def documents(model: MiniLM, limit: int | None, least: int) -> list[Document]:
    """Return those of the first `limit` topics that have at least `least` pieces."""
    topics = sorted(pydoc_data.topics.topics.items())[:limit]
    return _read(model, topics, least)


def licences(model: MiniLM, limit: int | None, least: int) -> list[Document]:
    """Return licences of installed packages, of at least `least` pieces, once each."""
    return _read(model, islice(_licence_files(), limit), least)


def _licence_files() -> Iterator[tuple[str, str]]:
    """Yield each licence's title, and its paragraphs that no earlier licence has."""
    known: set[bytes] = set()
    # Sorted, so that the same packages always give the same documents.
    packages = {x.metadata["Name"]: x for x in distributions()}
    for name, package in sorted(packages.items()):
        for file in sorted(package.files or (), key=str):
            path = file.locate()
            if not file.name.upper().startswith(_LICENCE) or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")[:_MAX_LICENCE]
            new = []
            for paragraph in text.split("\n\n"):
                # Equal up to spaces, line ends and capitals.
                digest = hashlib.sha256("".join(paragraph.split()).lower().encode())
                if digest.digest() not in known:
                    new.append(paragraph)
                known.add(digest.digest())
            yield f"{name} licence", "\n\n".join(new)


def _read(
    model: MiniLM, texts: Iterable[tuple[str, str]], least: int
) -> list[Document]:
    """Return (title, text) pairs as word pieces, without the short ones."""
    result = []
    for title, text in texts:
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        # Drop paragraphs with the underline of a heading.
        lines = [p for p in paragraphs if p and "***" not in p and "===" not in p]
        pieces = model.word_pieces(" ".join(lines))
        if len(pieces) >= least:
            result.append(Document(model.word_pieces(title), pieces))
    return result


def cut(pieces: list[int], length: int) -> np.ndarray:
    """Cut word pieces into passages (P, length) from [CLS] to [SEP]; drop the rest."""
    inner = length - 2  # without [CLS] and [SEP]
    count = len(pieces) // inner
    rows = np.array(pieces[: count * inner], int).reshape(count, inner)
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))


def sections(document: Document, length: int, max_sections: int) -> list[Section]:
    """Cut a document into passages, each with the sentence before it as its query.

    Queries and passages are disjoint parts of the text, so no passage contains its
    query.
    """
    result: list[Section] = []
    pieces, inner = document.text, length - 2
    start = 0
    while len(result) < max_sections and _STOP in pieces[start:]:
        stop = pieces.index(_STOP, start) + 1
        if _QUERY[0] <= stop - start <= _QUERY[1]:
            if len(pieces) < stop + inner:
                break
            query = [CLS, *document.title, *pieces[start:stop], SEP]
            passage = [CLS, *pieces[stop : stop + inner], SEP]
            result.append(Section(np.array(query), np.array(passage)))
            stop += inner
        start = stop
    return result
