"""The prose of the repository and the names in its code, read from the files."""

import ast
import io
import json
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CPP = ".cu", ".cuh", ".cpp", ".h"
PAGES = ".md", ".rst", ".cff"
_DIRECTIVES = "noqa", "type: ignore", "fmt:", "pragma"

# Words that readers had to decode, and what to write instead.
BANNED = {
    "nobody": (r"\bnobody\b", "name who does not"),
    "door": (r"\bdoors?\b", "conversion, boundary"),
    "told": (r"\btold\b", "receives, reads"),
    "meet": (r"\b(meets?|met|meetings?)\b", "synchronise, wait, satisfy"),
    "lot": (r"\blots?\b", "tie-break, many"),
    "anew": (r"\banew\b", "again"),
    "that which": (r"\b(that|those) which\b", "name it"),
    "is no X": (
        r"(?<!\bthere )\b(is|are|was|were) no\b(?! (longer|more\b))",
        "is not a",
    ),
    "share": (
        r"\b(an?|the|this|its|their|every|same) ((?!of|not)\w+ )?shares?\b"
        r"(?! (a|an|the|its|their|one|some|this|no)\b)|\bshares? of\b",
        "fraction, ratio, percentage",
    ),
    "in the place of": (r"\bin the places? of\b", "instead of"),
    "for good": (r"\bfor good\b", "until it is changed"),
    "speak": (r"\bspeaks?\b", "support"),
    "but for": (r"\bbut for\b", "except"),
    "as most": (r"\bas most\b", "like most …"),
    "so do": (r"\bso (do|does|they do|it does)\b(?! not)", "write the verb again"),
    "held against": (r"\b(held|holds?) against\b", "compare with, check against"),
}
# Names of many meanings: the field has a word for each of them.
VAGUE = {
    "found", "chosen", "given", "kind", "kinds", "most", "each", "told", "meet",
    "share", "shares", "place", "places", "never", "ahead", "begin", "begins", "lot",
    "lots", "thing", "things",
}  # fmt: skip


class Passage(NamedTuple):
    """A comment, a string or a page, and the line on which it starts."""

    file: str
    line: int
    text: str


def passages(file: Path) -> Iterator[Passage]:
    """Yield what a person reads in a file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        parts = [*python_comments(text), *python_strings(text)]
    elif file.suffix in CPP:
        parts = cpp_comments(text)
    elif file.suffix == ".ipynb":
        parts = notebook_prose(text)
    elif file.suffix in PAGES:
        parts = [(1, text)]
    elif file.parent.name == "faults":
        faults = tomllib.loads(text)["fault"]
        parts = [(text[: text.index(x["name"])].count("\n"), x["note"]) for x in faults]
    else:  # a shell script, a Makefile, pyproject.toml
        lines = enumerate(text.splitlines(), 1)
        parts = [(i, x[x.index("#") :]) for i, x in lines if "#" in x]
    for line, part in parts:
        yield Passage(file.name, line, part)


def python_comments(text: str) -> list[tuple[int, str]]:
    """Return the comments that are not directives of tools, with their lines."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (x.start[0], x.string)
        for x in tokens
        if x.type == tokenize.COMMENT and not any(y in x.string for y in _DIRECTIVES)
    ]


def python_strings(text: str) -> list[tuple[int, str]]:
    """Return docstrings, messages and other strings of several words."""
    return [
        (x.lineno, x.value)
        for x in ast.walk(ast.parse(text))
        if isinstance(x, ast.Constant) and isinstance(x.value, str) and " " in x.value
    ]


def cpp_comments(text: str) -> list[tuple[int, str]]:
    """Return the ``//`` comments; consecutive lines of comments are one."""
    parts: list[tuple[int, str]] = []
    last = -1
    for i, line in enumerate(text.splitlines(), 1):
        code, slashes, comment = line.partition("//")
        if not slashes:
            continue
        if last == i - 1 and not code.strip():
            parts[-1] = parts[-1][0], f"{parts[-1][1]}\n{comment}"
        else:
            parts.append((i, comment))
        last = i
    return parts


def notebook_prose(text: str) -> list[tuple[int, str]]:
    """Return Markdown cells and the comments of code cells, by the cell's number."""
    parts = []
    for i, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append((i, source))
        else:
            lines = [x.split("#", 1)[1] for x in source.splitlines() if "#" in x]
            parts += [(i, x) for x in lines]
    return parts


def banned_words(text: str) -> list[tuple[int, str]]:
    """Return (line within the text, word) of every banned word."""
    return [
        (text[: match.start()].count("\n"), word)
        for word, (pattern, _) in BANNED.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def names(file: Path) -> set[str]:
    """Return the names that a file defines or uses, without attributes."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        code = re.sub(r'//.*|"[^"\n]*"', "", text)
        return set(re.findall(r"(?<![.>:\w])[A-Za-z_]\w*", code))
    result = set()
    for x in ast.walk(ast.parse(text)):
        if isinstance(x, ast.Name):
            result.add(x.id)
        elif isinstance(x, ast.arg):
            result.add(x.arg)
        elif isinstance(x, ast.FunctionDef | ast.ClassDef):
            result.add(x.name)
    return result


def vague_names(file: Path) -> set[str]:
    """Return the names of a file that have many meanings."""
    return {x for x in names(file) if x.strip("_").lower() in VAGUE}


def comments_per_line(files: list[Path]) -> float:
    """Return the comments of Python files over their lines that are not blank."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    lines = sum(bool(x.strip()) for text in texts for x in text.splitlines())
    return sum(len(python_comments(text)) for text in texts) / lines


def messages(text: str, placeholder: int) -> list[tuple[int, int]]:
    """Return (line, length) of the strings that a file raises.

    A value that an f-string formats counts as `placeholder` characters.
    """
    result = []
    for x in ast.walk(ast.parse(text)):
        if isinstance(x, ast.Raise) and x.exc is not None:
            inner = {y for z in ast.walk(x.exc) for y in _parts(z)}
            for y in ast.walk(x.exc):
                if y not in inner and isinstance(y, ast.JoinedStr | ast.Constant):
                    result.append((y.lineno, _length(y, placeholder)))
    return result


def _parts(x: ast.AST) -> list[ast.AST]:
    return x.values if isinstance(x, ast.JoinedStr) else []


def _length(x: ast.JoinedStr | ast.Constant, placeholder: int) -> int:
    if isinstance(x, ast.Constant):
        return len(x.value) if isinstance(x.value, str) else 0
    values = [y.value if isinstance(y, ast.Constant) else None for y in x.values]
    return sum(placeholder if y is None else len(y) for y in values)
