"""The documentation's site: it builds, no link of it is broken, and it loads nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_blocks import ROOT


class Links(HTMLParser):
    """Ids and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids, self.links, self.loaded = set[str](), list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag != "a":
            self.loaded += [values[name] for name in ("src", "href") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site"


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    """What the builder does not check as well: links of included texts, and what pages load."""
    read = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(read) > 20
    wrong = []
    for path, page in read.items():
        if path.name == "404.html":  # its links start at the root
            continue
        for link in page.links + page.loaded:
            address, _, anchor = link.partition("#")
            if re.match(r"(https?:|mailto:|data:)", address):
                continue
            target = (path.parent / address).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{path.relative_to(site)}: {link}")
            elif anchor and target in read and anchor not in read[target].ids | {"__skip"}:
                wrong.append(f"{path.relative_to(site)}: no #{anchor} in {link}")
    assert not wrong


def test_the_site_needs_no_network(site: Path) -> None:
    loaded = {link for path in site.rglob("*.html") for link in Links(path.read_text()).loaded}
    assert not {link for link in loaded if re.match(r"(https?:)?//", link)}


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == there


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
