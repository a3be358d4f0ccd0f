"""Checks of notebooks that need no run; the documentation's build runs them."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_notebooks_exist():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_form(self, path):
        notebook = read(path)
        # 4.5 has cell ids.
        assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        names = [cell["id"] for cell in notebook["cells"]]
        assert len(set(names)) == len(names)
        nbformat = pytest.importorskip("nbformat")
        nbformat.validate(nbformat.from_dict(notebook))

    def test_no_outputs_are_stored(self, path):
        # Outputs change with each run and would hide real changes in a diff.
        for cell in read(path)["cells"]:
            assert cell["cell_type"] in ("markdown", "code")
            assert not cell["metadata"].keys() & {"execution", "collapsed", "scrolled"}
            if cell["cell_type"] == "code":
                assert cell["outputs"] == []
                assert cell["execution_count"] is None

    def test_starts_with_its_only_title(self, path):
        cells = read(path)["cells"]
        assert cells[0]["cell_type"] == "markdown"
        titles = [
            re.findall(r"^# .+$", source(cell), re.MULTILINE)
            for cell in cells
            if cell["cell_type"] == "markdown"
        ]
        assert len(titles[0]) == 1
        assert source(cells[0]).startswith(titles[0][0])
        assert not any(titles[1:])

    def test_code_is_python(self, path):
        """No magics: a script could contain the code of every cell."""
        code = [source(x) for x in read(path)["cells"] if x["cell_type"] == "code"]
        assert code
        assert all(ast.parse(text).body for text in code)

    def test_paths_are_relative(self, path):
        # Absolute paths start with /name/, ~/, C:\ or file:, after a quote or bracket.
        absolute = re.compile(r"""["'(](/(?!/)[\w.-]+/|~/|[A-Za-z]:\\|file:)""")
        for cell in read(path)["cells"]:
            assert not absolute.search(source(cell)), source(cell)

    def test_files_it_names_exist(self, path):
        text = "\n".join(source(cell) for cell in read(path)["cells"])
        folders = "benchmarks|docs|kernels|qm_cupy|tests"
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), name
