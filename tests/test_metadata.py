"""Metadata: the page of the package on an index, its citation and its changelog."""

import datetime
import re
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import qm_cupy

ROOT = Path(__file__).parents[1]
PAPER = "10.48550/arXiv.2508.13204"  # DataCite's DOI of the preprint
# [text](target) and ![text](target), also with the line break of a wrapped text.
LINK = re.compile(r"\]\(([^)\s]+)\)")
# "## [0.1.0] - 2026-11-27", as Keep a Changelog writes it.
RELEASE = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)
GROUPS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


@pytest.fixture(scope="module")
def core():
    """Return the metadata that hatchling writes into a wheel, after its checks."""
    return ProjectMetadata(str(ROOT), PluginManager()).core


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_page_of_the_package_has_absolute_links_only(core):
    """An index shows the page at its own address, so a relative link leads nowhere."""
    assert core.readme_content_type == "text/markdown"
    links = LINK.findall(core.readme)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "<img" not in core.readme


def test_the_page_of_the_package_says_what_the_readme_says(core):
    """Both have the same first paragraph and the same example."""
    readme, page = text("README.md"), core.readme
    assert readme.split("\n\n")[1] == page.split("\n\n")[1]
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert example.rstrip() in readme  # whose code test_readme.py runs


def test_the_page_of_the_package_lists_every_extra_for_users(core):
    table = core.readme.partition("| extra | adds |")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    developers = {"nvrtc", "notebooks", "test", "docs", "lint", "dev"}
    assert listed == set(core.optional_dependencies) - developers


def test_classifiers_and_addresses(core):
    """hatchling raises for an unknown classifier, and for two forms of the licence."""
    classifiers = core.classifiers
    assert core.license_expression == "MIT"
    assert not [x for x in classifiers if x.startswith("License ::")]
    assert core.requires_python == ">=3.11"
    minors = re.findall(r"Python :: 3\.(\d+)", "\n".join(classifiers))
    assert minors == ["11", "12", "13", "14"]
    for version in ("12", "13"):  # those of the extras cuda12 and cuda13
        assert f"Environment :: GPU :: NVIDIA CUDA :: {version}" in classifiers
    assert core.authors
    assert core.urls["Paper"] == "https://arxiv.org/abs/2508.13204"
    assert all(address.startswith("https://") for address in core.urls.values())


def test_the_changelog_has_a_date_for_each_version():
    releases = RELEASE.findall(text("CHANGELOG.md"))
    assert releases[0] == ("Unreleased", "")
    assert releases[1][0] == qm_cupy.__version__
    dates = [datetime.date.fromisoformat(day) for _, day in releases[1:]]
    assert dates == sorted(dates, reverse=True)
    for section in RELEASE.split(text("CHANGELOG.md"))[3::3]:
        groups = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert groups == [x for x in GROUPS if x in groups]  # known, once, in order


def test_the_citation():
    """The form is that of https://citation-file-format.github.io, version 1.2.0."""
    yaml = pytest.importorskip("yaml")
    cff = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)  # all required
    assert cff["cff-version"] == "1.2.0"
    assert cff["version"] == qm_cupy.__version__
    assert cff["license"] == "MIT"
    # YAML would read a date without quotes as an object; the schema wants a string.
    (released,) = [d for v, d in RELEASE.findall(text("CHANGELOG.md")) if v[0] == "0"]
    assert cff["date-released"] == released
    paper = cff["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["doi"] == PAPER
    assert paper["url"] == "https://arxiv.org/abs/2508.13204"
    # The pattern of the schema.
    assert re.fullmatch(r"10\.\d{4,9}(\.\d+)?/[A-Za-z0-9:/_;\-.()\[\]\\]+", PAPER)
    assert [x["family-names"] for x in paper["authors"]] == ["Liu", "Yu"]
