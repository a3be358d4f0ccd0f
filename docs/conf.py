"""The documentation: `make docs` builds it into build/docs, warnings being errors.

Pages are MyST notebooks, executed while they are built; so are those of notebooks/,
which a link brings under this folder: their kernels start where the notebooks lie.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

import qm_cupy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
os.environ["PYTHONPATH"] = str(ROOT)  # the kernels import this checkout, too
here = Path(sys.executable).parent, os.environ.get("PATH", "")
os.environ["PATH"] = os.pathsep.join(map(str, here))  # where `qm-cupy` is

NOTEBOOKS = HERE / "notebooks"
if not NOTEBOOKS.is_symlink():
    NOTEBOOKS.symlink_to(Path("..") / "notebooks", target_is_directory=True)

# Pages that run torch or JAX are executed where these are installed, and named if not.
MISSING = {name for name in ("torch", "jax") if importlib.util.find_spec(name) is None}
USED = re.compile(r"^[\s\"]*(?:import|from) (?:qm_cupy\.)?(torch|jax)\b", re.MULTILINE)


def needs(page):
    """Return which of torch and JAX a page runs."""
    return set(USED.findall(page.read_text(encoding="utf-8")))


NOT_RUN = sorted(
    page.relative_to(HERE).as_posix()
    for folder in (HERE, NOTEBOOKS)  # a pattern does not follow the link
    for page in (*folder.rglob("*.md"), *folder.rglob("*.ipynb"))
    if needs(page) & MISSING
)
if NOT_RUN:
    without = ", ".join(sorted(MISSING))
    sys.stderr.write(f"not executed without {without}: {', '.join(NOT_RUN)}\n")

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
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"(scipy|torch|jax)\..*"),  # no inventories are downloaded
    ("py:obj", "token|budget"),  # parameters that bear a module's name
]
default_role = "autolink"

autodoc_typehints = "none"  # docstrings have the types, with their shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the template lists them
numpydoc_class_members_toctree = False

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 2
nb_execution_mode = "force"
nb_execution_excludepatterns = NOT_RUN
if NOT_RUN:
    # A run says what language a page is in; the API of a framework takes the framework.
    suppress_warnings = ["myst-nb.lexer", "toc.excluded"]
    exclude_patterns.append("frameworks.rst")
    nitpick_ignore_regex += [
        (r"py:\w+", rf"qm_cupy\.{name}(\..*)?") for name in sorted(MISSING)
    ]
nb_execution_show_tb = True  # and a warning, which is an error
nb_execution_timeout = 180
nb_merge_streams = True
nb_render_markdown_format = "myst"  # which has tables

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


def of_the_package(app, env, node, content):
    """Resolve a name in a docstring of `qm_cupy.torch`, say, as one of `qm_cupy`."""
    if node["refdomain"] != "py":
        return None
    target = f"qm_cupy.{node['reftarget']}"
    python = env.get_domain("py")
    return python.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, content
    )


def setup(app):
    app.connect("missing-reference", of_the_package)
