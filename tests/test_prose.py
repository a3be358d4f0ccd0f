"""Prose is plain, a name has one meaning, and hard code has comments."""

import re
from pathlib import Path

import prose
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = "qm_cupy", "kernels", "benchmarks", "tests", "docs", "notebooks"
SUFFIXES = {".py", ".sh", ".ipynb", ".toml", *prose.CPP, *prose.PAGES}
LIST = ROOT / "tests" / "prose.py"  # holds the banned words themselves
ROOT_PAGES = (
    "README.md", "PACKAGE.md", "CHANGELOG.md", "CITATION.cff", "Makefile",
    "pyproject.toml",
)  # fmt: skip
FILES = {
    folder: [
        file
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in SUFFIXES and file not in (LIST, Path(__file__))
    ]
    for folder in FOLDERS
}
FILES["."] = [ROOT / name for name in ROOT_PAGES]
CODE = [x for files in FILES.values() for x in files if x.suffix in {".py", *prose.CPP}]

MIN_COMMENTS = 0.08  # per line: well-commented libraries have 0.07 to 0.22
MAX_CHARACTERS = 300  # of an error message
PLACEHOLDER = 15  # characters that a formatted value counts for: a shape or a dtype

# Names that other libraries or recorded files give. All others have synonyms.
ALLOWED = {
    "tests/mutants.py": {"kind"},  # the key of tests/faults/*.toml and of mutants.json
    "tests/rehearsal/cupy/_functions.py": {"kind"},  # the argument of CuPy's `sort`
    # hypothesis
    "tests/test_properties.py": {"given"},
    "tests/caches/test_evict.py": {"given"},
    "tests/caches/test_kv_stream.py": {"given"},
    "tests/caches/test_merge_stream.py": {"given"},
}
# Files whose reader asks "why" at every step.
HARD = (
    "arrays/conversion", "autodiff/dispatch", "autodiff/torch_operators",
    "autodiff/jax_operators", "cuda/launch", "cuda/tiles",
    "stages/clustering/weighted_linkage", "stages/clustering/linkage_cuda",
    "stages/selection/philox",
)  # fmt: skip


@pytest.mark.parametrize("folder", FILES)
def test_no_banned_word(folder):
    hits = [
        f"{file.relative_to(ROOT)}:{passage.line + line}: {word}; "
        f"instead: {prose.BANNED[word][1]}"
        for file in FILES[folder]
        for passage in prose.passages(file)
        for line, word in prose.banned_words(passage.text)
    ]
    assert hits == []


def test_a_name_has_one_meaning():
    vague = {str(x.relative_to(ROOT)): prose.vague_names(x) for x in CODE}
    assert {file: x for file, x in vague.items() if x} == ALLOWED


@pytest.mark.parametrize("folder", ["qm_cupy", "benchmarks", "tests"])
def test_code_has_comments(folder):
    files = [x for x in FILES[folder] if x.suffix == ".py"]
    assert prose.comments_per_line(files) >= MIN_COMMENTS


@pytest.mark.parametrize("name", HARD)
def test_hard_code_has_comments(name):
    """A file that only its author understands does not hide behind the average."""
    assert prose.comments_per_line([ROOT / f"qm_cupy/{name}.py"]) >= MIN_COMMENTS


KERNELS = [x for x in FILES["kernels"] if x.suffix in prose.CPP]


@pytest.mark.parametrize("file", KERNELS, ids=lambda x: f"{x.parent.name}/{x.name}")
def test_a_kernel_file_opens_with_an_explanation(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("//") for line in lines[:2])


def test_no_line_of_a_page_is_a_comment_by_accident():
    """MyST drops a line that starts with %, which "50 %" does after a line break."""
    hits = [
        f"{file.relative_to(ROOT)}: {line}"
        for file in FILES["docs"]
        if file.suffix == ".md"
        for line in re.sub(r"```.*?```", "", file.read_text("utf-8"), flags=re.S).split(
            "\n"
        )
        if line.lstrip().startswith("%")
    ]
    assert hits == []


def test_messages_are_short():
    long = [
        f"{file.relative_to(ROOT)}:{line}: {length} characters"
        for file in FILES["qm_cupy"]
        if file.suffix == ".py"
        for line, length in prose.messages(file.read_text("utf-8"), PLACEHOLDER)
        if length > MAX_CHARACTERS
    ]
    assert long == []


class TestProse:
    """Each check finds an example that is written for it."""

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("On a GPU nobody looks.", "nobody"),
            ("conversion, the door", "door"),
            ("as it was told", "told"),
            ("blocks meet\nonce", "meet"),
            ("a lot decides", "lot"),
            ("numbered anew", "anew"),
            ("that which is left", "that which"),
            ("X is no mapping", "is no X"),
            ("a share of the tokens", "share"),
            ("the largest share", "share"),
            ("in the place of None", "in the place of"),
            ("set for good", "for good"),
            ("what speaks DLPack", "speak"),
            ("equal but for rounding", "but for"),
            ("are copied, as most", "as most"),
            ("and so do the others", "so do"),
            ("launches held against limits", "held against"),
        ],
    )
    def test_banned_words(self, text, word):
        assert [x for _, x in prose.banned_words(text)] == [word]

    @pytest.mark.parametrize(
        "text",
        [
            "There is no such method.",
            "The mask is no longer read.",
            "Both views share memory with the input.",
            "Shared memory of a block.",
            "a doorway, a slot, allotted",
        ],
    )
    def test_plain_words(self, text):
        assert prose.banned_words(text) == []

    def test_every_banned_word_has_an_example(self):
        examples = self.test_banned_words.pytestmark[0].args[1]
        assert {word for _, word in examples} == set(prose.BANNED)

    def test_lines_of_banned_words(self):
        assert prose.banned_words("One.\nTwo\nmeet.") == [(2, "meet")]

    def test_passages(self, tmp_path):
        files = {
            "a.py": '"""A doc string."""\nx = 1  # why\ny = "word"  # noqa: E501\n',
            "a.cu": "// one\n// two\nint x;  // three\nint y = 1;\n",
            "a.md": "# Title\n",
            "a.sh": "make x  # why\n",
            "a.ipynb": '{"cells": [{"cell_type": "markdown", "source": ["Text"]},'
            ' {"cell_type": "code", "source": ["x = 1  # code"]}]}',
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        result = {
            name: [(x.line, x.text) for x in prose.passages(tmp_path / name)]
            for name in files
        }
        assert result == {
            "a.py": [(2, "# why"), (1, "A doc string.")],
            "a.cu": [(1, " one\n two"), (3, " three")],
            "a.md": [(1, "# Title\n")],
            "a.sh": [(1, "# why")],
            "a.ipynb": [(0, "Text"), (1, " code")],
        }

    def test_vague_names(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "def f(kind):\n    found = x.place\n    return found_all\n"
        )
        (tmp_path / "a.cu").write_text(
            'int most = x.begin();  // each\nprint("told", NEVER);\n'
        )
        assert prose.vague_names(tmp_path / "a.py") == {"kind", "found"}
        assert prose.vague_names(tmp_path / "a.cu") == {"most", "NEVER"}

    def test_comments_per_line(self, tmp_path):
        (tmp_path / "a.py").write_text("# why\nx = 1\n\ny = 2  # a shape\nz = 3\n")
        assert prose.comments_per_line([tmp_path / "a.py"]) == 2 / 4

    def test_messages(self):
        text = 'raise ValueError(f"`{name}` is 3")\nraise OSError("ab") from e\nraise'
        assert prose.messages(text, 10) == [(1, 7 + 10), (2, 2)]
