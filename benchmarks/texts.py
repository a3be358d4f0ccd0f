"""English that every Python has with it: the topics of its language reference."""

import pydoc_data.topics
from typing import NamedTuple

import numpy as np
from minilm import CLS, SEP, MiniLM


class Document(NamedTuple):
    """Word pieces of a topic: title and first sentence, and the rest."""

    query: list[int]
    text: list[int]


def documents(model: MiniLM, limit: int | None, least: int) -> list[Document]:
    """Return the topics, of the first `limit`, with `least` word pieces or more."""
    found = []
    for title, text in sorted(pydoc_data.topics.topics.items())[:limit]:
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        lines = [p for p in paragraphs if p and "***" not in p and "===" not in p]
        first, _, rest = " ".join(lines).partition(". ")
        pieces = model.word_pieces(rest)
        if len(pieces) >= least:
            found.append(Document(model.word_pieces(f"{title}: {first}"), pieces))
    return found


def cut(pieces: list[int], length: int) -> np.ndarray:
    """Cut word pieces into whole passages (P, length) in [CLS] and [SEP]."""
    inner = length - 2
    count = len(pieces) // inner
    rows = np.array(pieces[: count * inner], int).reshape(count, inner)
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, SEP)))
