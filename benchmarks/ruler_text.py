"""Random words and numbers, essays, and facts hidden in them, for RULER's tasks."""

import functools
import random
import re
import uuid
from collections.abc import Callable

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again."
)
_SHORT = 120  # paragraphs of fewer characters are headings and lists


@functools.cache
def words(*parts_of_speech: str) -> tuple[str, ...]:
    """Return the words of `wonderwords` of these parts of speech, each of them once.

    Parameters
    ----------
    *parts_of_speech : {"noun", "verb", "adjective"}
        What to return.
    """
    from wonderwords import RandomWord

    # Sorted, because the order of a set changes from run to run.
    return tuple(sorted(set(RandomWord().filter(include_categories=parts_of_speech))))


@functools.cache
def _paragraphs() -> tuple[str, ...]:
    """Return the paragraphs of prose of Python's reference."""
    from pydoc_data.topics import topics

    parts = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    texts = (" ".join(part.split()) for part in parts)
    return tuple(
        text
        for text in texts
        if len(text) > _SHORT and text[0].isupper() and text[-1] == "."
    )


def essay(rng: random.Random, num_words: int) -> list[str]:
    """Return words of an essay, which starts at a random paragraph."""
    paragraphs = _paragraphs()
    start = rng.randrange(len(paragraphs))
    result: list[str] = []
    while len(result) < num_words:  # from the end on at the beginning, if need be
        result += paragraphs[start % len(paragraphs)].split()
        start += 1
    return result[:num_words]


def sentences(some_words: list[str]) -> list[str]:
    """Return the sentences of a text; the last one may be incomplete."""
    return re.split(r"(?<=[.!?]) ", " ".join(some_words)) if some_words else []


def hidden(hay: list[str], needles: list[str], depths: list[float]) -> list[str]:
    """Insert needles before the entries of `hay` at ascending depths in [0, 1]."""
    result = list(hay)
    # From the last one on, so that the positions of the others stay right.
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        result.insert(int(depth * len(hay)), needle)
    return result


def numbered(some_words: list[str]) -> str:
    """Return "1. first 2. second ..."."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(some_words, 1))


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Draw until there are `count` different results, and return these."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def key(rng: random.Random) -> str:
    """Return an adjective and a noun."""
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def number(rng: random.Random, digits: int) -> str:
    """Return a number of this many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def letters(rng: random.Random, alphabet: str, count: int) -> str:
    """Return a word of random letters."""
    return "".join(rng.choices(alphabet, k=count))


def magic(values: str, rng: random.Random) -> str:
    """Return a number of 7 digits, or a UUID if `values` is "uuids"."""
    if values == "numbers":
        return number(rng, 7)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
