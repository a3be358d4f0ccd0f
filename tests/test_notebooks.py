"""Checks of notebooks that need no run; the documentation's build runs them."""

import ast
import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITH_OUTPUTS = {"language_model"}
# A start of what is a path from the root of a file system: /name/, ~/, C:\ or file:,
# after a quote or bracket.
ABSOLUTE = re.compile(r"""["'(](/(?!/)[\w.-]+/|~/|[A-Za-z]:\\|file:)""")


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

    def test_outputs_of_every_cell_or_of_none(self, path):
        cells = read(path)["cells"]
        for cell in cells:
            assert cell["cell_type"] in ("markdown", "code")
            assert not cell["metadata"].keys() & {"execution", "collapsed", "scrolled"}
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        counts = [cell["execution_count"] for cell in code]
        outputs = [x for cell in code for x in cell["outputs"]]
        if path.stem in WITH_OUTPUTS:
            # The cells ran once, one after the other.
            assert counts == list(range(1, len(code) + 1))
            assert outputs
        else:
            assert not outputs
            assert set(counts) == {None}

    def test_outputs_are_small_and_of_no_machine(self, path):
        assert path.stat().st_size < 200_000
        for cell in read(path)["cells"]:
            for output in cell.get("outputs", []):
                # A path, a progress bar or an error is of one run alone.
                assert not ABSOLUTE.search(json.dumps(output))
                assert output["output_type"] != "error"
                assert output.get("name") != "stderr"

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
        for cell in read(path)["cells"]:
            assert not ABSOLUTE.search(source(cell)), source(cell)

    def test_files_it_names_exist(self, path):
        text = "\n".join(source(cell) for cell in read(path)["cells"])
        folders = "benchmarks|docs|kernels|qm_cupy|tests"
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def compare():
    """Return the script that compares outputs."""
    path = ROOT / "docs" / "notebook_outputs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(*outputs, source="1"):
    """Return a notebook whose cells have these outputs each."""
    cells = [
        {"cell_type": "code", "id": str(i), "execution_count": 1, "outputs": x}
        | {"source": [source], "metadata": {}}
        for i, x in enumerate(outputs)
    ]
    return {"cells": [{"cell_type": "markdown", "source": ["# A"]}, *cells]}


def printed(*lines, name="stdout"):
    return {"output_type": "stream", "name": name, "text": list(lines)}


def shown(**data):
    data = {name.replace("_", "/"): [text] for name, text in data.items()}
    return {"output_type": "execute_result", "data": data, "metadata": {}}


class TestStoredOutputs:
    @pytest.mark.parametrize(
        ("stored", "run", "same"),
        [
            ([printed("KL 0.0139\n")], [printed("KL 0.0141\n")], True),
            ([printed("KL 0.0139\n")], [printed("KL 0.0239\n")], False),
            ([printed("KL 0.0139\n")], [printed("CE 0.0139\n")], False),
            ([printed("3 of 4\n")], [printed("3 of\n")], False),
            ([printed("1\n")], [], False),
            ([printed("1\n")], [shown(text_plain="1")], False),
            ([printed("1\n")], [printed("1\n"), printed("2", name="stderr")], True),
            # What is printed after the first text is in that text, too.
            ([printed("1\n", "2\n")], [printed("1\n2\n"), printed("2\n")], True),
            # Colours are not compared, texts are.
            (
                [shown(text_html="<b style='color:red'>a 3</b>", text_plain="<A>")],
                [shown(text_html="<b style='color:blue'>a 3</b>", text_plain="<B>")],
                True,
            ),
            (
                [shown(text_html="<b>a</b>", text_plain="<A>")],
                [shown(text_html="<b>b</b>", text_plain="<A>")],
                False,
            ),
            # Pictures are not compared, but there must be one.
            (
                [shown(image_png="AA", text_plain="<Figure at 1>")],
                [shown(image_png="BB", text_plain="<Figure at 2>")],
                True,
            ),
            ([shown(text_plain="x")], [shown(image_png="B", text_plain="x")], False),
        ],
    )
    def test_differences(self, compare, stored, run, same):
        both = notebook([], stored), notebook([], run)
        assert compare.differences(*both) == ([] if same else ["1"])

    def test_other_code_is_a_difference(self, compare):
        assert compare.differences(notebook([]), notebook([], source="2")) == ["0"]

    def test_write_stores_what_the_comparison_accepts(self, compare, tmp_path):
        outputs = [printed("a\n"), printed("b\n", name="stderr"), shown(text_plain="c")]
        run = notebook([], outputs)
        path = tmp_path / "a.ipynb"
        # The same notebook before any run.
        stored = copy.deepcopy(run)
        for cell in stored["cells"][1:]:
            cell["outputs"], cell["execution_count"] = [], None
        path.write_text(json.dumps(stored), encoding="utf-8")
        assert compare.differences(read(path), run) == ["1"]
        compare.write(path, run)
        assert compare.differences(read(path), run) == []
        counts = [cell.get("execution_count") for cell in read(path)["cells"]]
        assert counts == [None, 1, 2]
        assert "stderr" not in path.read_text()
