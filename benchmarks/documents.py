"""Documents on which the language model is measured: three classes of English text.

- language: Python's own reference, `pydoc_data.topics` of the standard library.
- book: the King James Bible, by the command `bible` of the Debian package bible-kjv.
- policy: the Debian Policy Manual and the Filesystem Hierarchy Standard, of the Debian
  package debian-policy.

    apt-get install bible-kjv debian-policy

A document is `LENGTH` tokens of one class: a context, of which a measurement may read
only the last part, and the tokens that follow it. So the same tokens are predicted from
contexts of every length. The first third of a class is for tuning. Its other documents
are held out: no option of any method was selected by them.
"""

import gzip
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = 4096  # the longest context, in tokens
PREDICTED = 128  # tokens that follow it, and are predicted
LENGTH = CONTEXT + PREDICTED + 1
FOLDER = Path("/usr/share/doc/debian-policy")
_MAX_CHARACTERS = 500_000  # of each class, about


class Document(NamedTuple):
    """The tokens of one document."""

    name: str  # its class and number
    ids: list[int]  # LENGTH tokens

    def context(self, num_tokens: int) -> list[int]:
        """Return the last tokens of the context."""
        return self.ids[CONTEXT - num_tokens : CONTEXT]

    @property
    def continuation(self) -> list[int]:
        """The PREDICTED tokens after the context, and one more to predict."""
        return self.ids[CONTEXT:]


def language() -> str:
    """Return Python's reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def book() -> str:
    """Return the King James Bible without the numbers of its verses."""
    if shutil.which("bible") is None:
        raise FileNotFoundError(
            "the command `bible` is missing: `apt-get install bible-kjv`"
        )
    # A line for each verse, which begins with its number.
    command = ["bible", "-f", "-l100000", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    verses = (line.strip() for line in text.splitlines())
    return " ".join(_without_number(verse) for verse in verses if verse)


def _without_number(verse: str) -> str:
    """Return a line without a word such as "Ge1:1" at its start."""
    first, _, rest = verse.partition(" ")
    return rest if ":" in first and first[-1].isdigit() else verse


def policy() -> str:
    """Return the texts of the Debian policy, from their first chapters on."""
    parts = []
    for name in ("policy.txt.gz", "fhs/fhs-3.0.txt.gz"):
        path = FOLDER / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: `apt-get install debian-policy`"
            )
        text = gzip.decompress(path.read_bytes()).decode()
        parts.append(text[20_000:])  # after the table of contents
    return "\n\n".join(parts)


CLASSES: dict[str, Callable[[], str]] = {
    "language": language,
    "book": book,
    "policy": policy,
}


def byte_documents(count: int) -> list[Document]:
    """Return documents for a random model: bytes of Python's reference."""
    text = language().encode()
    pieces = [text[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]
    return [Document(f"bytes {i}", list(piece)) for i, piece in enumerate(pieces)]


def documents(
    tokenizer: Any, split: str, count: int, classes: Any = None
) -> list[Document]:
    """Return `count` documents of each class; `split` is "tuning" or "held_out".

    They are spread evenly over the documents of the class and the split.
    """
    picked = []
    for name in classes or CLASSES:
        text = CLASSES[name]()
        # The same number of characters of each class, spread over the whole text.
        step = max(1, len(text) // _MAX_CHARACTERS)
        size = 6 * LENGTH  # a token has at most six characters in each of these texts
        pieces = [text[i : i + size] for i in range(0, len(text) - size, size * step)]
        third = len(pieces) // 3
        part = pieces[:third] if split == "tuning" else pieces[third:]
        if len(part) < count:
            raise ValueError(f"{name} has {len(part)} documents, not {count}")
        for i in range(count):
            number = i * len(part) // count
            ids = tokenizer(part[number]).input_ids[:LENGTH]
            if len(ids) < LENGTH:
                raise ValueError(f"a document of {name} has only {len(ids)} tokens")
            offset = 0 if split == "tuning" else third
            picked.append(Document(f"{name} {number + offset}", ids))
    # One of each class, then the next of each class: any first part is balanced.
    names = list(classes or CLASSES)
    return [picked[c * count + i] for i in range(count) for c in range(len(names))]
