"""Every name in the docs exists, and everything public is in them; without Sphinx."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import qm_cupy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Folders without pages of their own; `api` and `notebooks` are results of the build.
NO_PAGES = {DOCS / name for name in ("_templates", "api", "notebooks")}
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*"))
    if path.suffix in (".md", ".rst") and not NO_PAGES & {*path.parents}
}
READMES = "kernels/README.md", "qm_cupy/autodiff/README.md", "tests/ptx/README.md"
TOCTREE = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)
# [text](path#anchor), without the anchor.
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
SCRIPT = re.compile(r"\b(?:benchmarks|tests|notebooks)/[\w/]+\.(?:py|sh|json|ipynb)\b")


def listed(page):
    """Yield the pages in the tables of contents of a page."""
    folder = Path(page).parent
    for block in TOCTREE.findall(PAGES[page]):
        # Lines with ":" are options.
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

    The names of `qm_cupy.api` and `qm_cupy.jax` are those of the package itself.
    """
    names_of = {"qm_cupy": qm_cupy.__all__}
    for module in pkgutil.iter_modules(qm_cupy.__path__, "qm_cupy."):
        if module.name in ("qm_cupy.api", "qm_cupy.jax"):
            continue
        # The source is read, because an import of torch's module needs torch.
        name = module.name.split(".")[1]
        file = f"{name}/__init__.py" if module.ispkg else f"{name}.py"
        text = Path(module.module_finder.path, file)
        names = re.search(
            r"^__all__ = (\[.*?\])", text.read_text(encoding="utf-8"), re.M | re.S
        )
        if names:
            names_of[module.name] = ast.literal_eval(names[1])
    return names_of


# A page in no table cannot be reached; in two, the way back is ambiguous.
def test_every_page_is_in_one_toctree():
    pages = [name for page in PAGES for name in listed(page)]
    notebooks = [f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")]
    assert sorted([*pages, "index"]) == sorted([*PAGES, *notebooks])


def test_no_page_is_a_symbolic_link():
    """Windows, and archives of a checkout, may not have them."""
    assert [path for path in DOCS.rglob("*") if path.is_symlink()] == []
    assert "symlink" not in (DOCS / "conf.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_scripts_exist(page):
    folder = (DOCS / page).parent
    text = PAGES[page].replace("\\_", "_")  # Markdown escapes underscores
    for link in LINK.findall(text):
        if "://" not in link:  # the network is not needed
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


# A measurement without its script or its figures cannot be repeated or checked.
def test_every_benchmark_and_its_figures_are_in_the_measurements():
    text = PAGES["measured/index"] + PAGES["measured/gpu"]
    scripts = {path.name for path in ROOT.glob("benchmarks/*.*")}
    # Scripts and pages, in both directions.
    assert scripts == set(re.findall(r"benchmarks/(\w+\.(?:py|sh))\)", text))
    results = ROOT / "benchmarks" / "results"
    figures = {path.relative_to(results).as_posix() for path in results.rglob("*.json")}
    assert figures <= set(re.findall(r"benchmarks/results/([\w/]+\.json)\)", text))


# A page of a stage says which kernels compute it.
def test_every_kernel_file_is_in_a_stage():
    text = "".join(text for page, text in PAGES.items() if page.startswith("stages/"))
    files = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in ROOT.glob("kernels/**/*.cu*")
    }
    assert files == set(re.findall(r"\(\.\./\.\./kernels/([\w/]+\.cuh?)\)", text))


def test_only_pages_that_run_have_code_cells():
    for page, text in PAGES.items():
        runs = text.startswith("---\nfile_format: mystnb\n")
        assert runs == ("```{code-cell}" in text), page
        # Code that never runs goes wrong unnoticed.
        assert "```python" not in text, f"{page} has Python code that never runs"
