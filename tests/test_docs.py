"""What the pages name is there, and what is there is named. No Sphinx is needed."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import qm_cupy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NO_PAGES = {DOCS / name for name in ("_templates", "api", "notebooks")}  # last: built
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*"))
    if path.suffix in (".md", ".rst") and not NO_PAGES & {*path.parents}
}
READMES = "kernels/README.md", "qm_cupy/autodiff/README.md", "tests/ptx/README.md"
TOCTREE = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
SCRIPT = re.compile(r"\b(?:benchmarks|tests|notebooks)/[\w/]+\.(?:py|sh|json|ipynb)\b")


def listed(page):
    """Yield the pages in a page's tables of contents."""
    folder = Path(page).parent
    for block in TOCTREE.findall(PAGES[page]):
        lines = (line for line in block.split("\n") if line and line[0] != ":")
        yield from ((folder / line).as_posix() for line in lines)


def test_api_lists_every_public_name_once():
    listed = {}
    text = PAGES["api"] + PAGES["frameworks"]
    for part in text.split(".. currentmodule:: ")[1:]:
        module, rest = part.split("\n", 1)
        blocks = re.findall(r"   :toctree: api\n\n((?:   \w+\n)+)", rest)
        listed[module] = sorted(name for block in blocks for name in block.split())
    assert listed == {module: sorted(names) for module, names in public().items()}


def public():
    """Return the names of the package and of the modules that users import.

    Those of `qm_cupy.jax` are the package's own.
    """
    found = {"qm_cupy": qm_cupy.__all__}
    for module in pkgutil.iter_modules(qm_cupy.__path__, "qm_cupy."):
        if module.name == "qm_cupy.jax":
            continue
        name = module.name.split(".")[1]
        file = f"{name}/__init__.py" if module.ispkg else f"{name}.py"
        text = Path(module.module_finder.path, file)
        names = re.search(
            r"^__all__ = (\[.*?\])", text.read_text(encoding="utf-8"), re.M | re.S
        )
        if names:
            found[module.name] = ast.literal_eval(names[1])
    return found


def test_every_page_is_in_one_toctree():
    found = [name for page in PAGES for name in listed(page)]
    notebooks = [f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")]
    assert sorted([*found, "index"]) == sorted([*PAGES, *notebooks])


@pytest.mark.parametrize("page", PAGES)
def test_links_and_scripts_exist(page):
    folder = (DOCS / page).parent
    text = PAGES[page].replace("\\_", "_")
    for link in LINK.findall(text):
        if "://" not in link:
            assert (folder / link).exists(), link
    for path in SCRIPT.findall(text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("readme", READMES)
def test_links_of_readmes_exist(readme):
    path = ROOT / readme
    text = path.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        assert (path.parent / link).exists(), link
    for name in SCRIPT.findall(text):
        assert (ROOT / name).exists(), name


def test_every_benchmark_and_its_figures_are_in_the_measurements():
    text = PAGES["measured/index"] + PAGES["measured/gpu"]
    scripts = {path.name for path in ROOT.glob("benchmarks/*.*")}
    assert scripts == set(re.findall(r"benchmarks/(\w+\.(?:py|sh))\)", text))
    results = ROOT / "benchmarks" / "results"
    figures = {path.relative_to(results).as_posix() for path in results.rglob("*.json")}
    assert figures <= set(re.findall(r"benchmarks/results/([\w/]+\.json)\)", text))


def test_every_kernel_file_is_in_a_stage():
    text = "".join(text for page, text in PAGES.items() if page.startswith("stages/"))
    files = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in ROOT.glob("kernels/**/*.cu*")
    }
    assert files == set(re.findall(r"\(\.\./\.\./kernels/([\w/]+\.cuh?)\)", text))


def test_pages_that_run_have_cells_and_the_others_none():
    for page, text in PAGES.items():
        runs = text.startswith("---\nfile_format: mystnb\n")
        assert runs == ("```{code-cell}" in text), page
        assert "```python" not in text, f"{page} has Python that nobody runs"
