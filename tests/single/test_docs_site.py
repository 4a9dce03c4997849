"""The site of the documentation: it builds, links lead somewhere, nothing comes from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("material")

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300  # some ten times what it takes on two busy cores
# Attributes from which a browser loads something, other than the links that a reader may follow.
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """What a page has anchors for, where it links to, and what it shows as text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text: list[str] = []
        self._within: list[str] = []  # elements whose text is no prose
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if value and (tag, name) in LOADS:
                self.loaded.append(value)
            elif value and (tag, name) == ("a", "href"):
                self.links.append(value)
        if tag in ("code", "script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._within and tag == self._within[-1]:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """All pages, as `make docs` builds them, without a network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "all")}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert built.returncode == 0, built.stdout
    # The page for wrong addresses has links from the root of a server, which is not there.
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_the_site_has_all_documents(site: dict[Path, Page]) -> None:
    names = {path.stem for path in site}
    documents = {path.stem for path in (ROOT / "docs").rglob("*.md")}
    assert documents | {"index", "CONTRIBUTING", "CHANGELOG"} <= names


def test_every_link_and_anchor_resolves(site: dict[Path, Page]) -> None:
    wrong = []
    for path, page in site.items():
        for link in (*page.links, *page.loaded):
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            target = path if not parts.path else target
            anchor = urllib.parse.unquote(parts.fragment)
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or (anchor and anchor not in site[target].anchors):
                wrong.append(f"{path.name}: {link}")
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    loaded = {link for page in site.values() for link in page.loaded}
    assert loaded
    assert not [link for link in loaded if urllib.parse.urlsplit(link).netloc]
    styles = [*next(iter(site)).parent.rglob("*.css")]
    assert not [path for path in styles if re.search(r"url\(['\"]?(https?:)?//", path.read_text())]


def test_markdown_was_understood(site: dict[Path, Page]) -> None:
    """Lists and tables that the site's Markdown does not take would stay as they were written."""
    left = re.compile(r"^ *(?:[-*] \S|\|).*|.*(?:```|\*\*|:::|\]\().*", re.MULTILINE)
    found = {
        path.name: match[0]
        for path, page in site.items()
        if (match := left.search("".join(page.text)))
    }
    assert not found


def test_the_reference_has_the_public_names(site: dict[Path, Page]) -> None:
    anchors = set().union(*(page.anchors for page in site.values()))
    names = {"gq_horovod.torch.GlobalQSGD", "gq_horovod.tensorflow.GlobalQSGD"}
    names |= {"gq_horovod.torch.allreduce", "gq_horovod.tensorflow.keras.DistributedOptimizer"}
    names |= {"mpi_ops.reduction.allreduce", "mpi_ops.reduction.iallreduce"}
    names |= {"mpi_ops.op.exponential_sum", "gq-horovod-advise", "gq-horovod-env"}
    assert names <= anchors
