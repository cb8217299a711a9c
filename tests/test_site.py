"""The documentation's site: it builds, no link of it is broken, and it loads nothing from elsewhere."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from browsers import chromium
from doc_blocks import ROOT
from public_api import public


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
    package = folder / ".typecheck" / "comask"  # as `make docs` lays it out
    package.mkdir(parents=True)
    for entry in (ROOT / "comask").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("export", "runtime", "cli", "calib"):
        (package / name).symlink_to(ROOT / name)
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


def test_what_is_public_is_in_the_reference(site: Path) -> None:
    """Each name of `tests/api` has a place of its own."""
    ids = set[str]()
    for path in (site / "api").rglob("*.html"):
        ids |= Links(path.read_text()).ids
    wanted = {
        f"{module}.{name}"
        for module, names in public().items()
        for name, value in names.items()
        if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))
    }
    # errors of streams are named by `comask.runtime` as well
    twice = {"comask.runtime.FrameDroppedError", "comask.runtime.QueueFullError"}
    assert not wanted - ids - twice


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address: a browser lets no file search others."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 400])
def test_pages_fit_and_load_without_an_error(
    browser: Any, served: str, site: Path, width: int
) -> None:
    browser.set_window_size(width, 900)
    wrong = []
    for path in sorted(site.rglob("index.html")):
        page = path.parent.relative_to(site).as_posix()
        browser.get(f"{served}/{page}/")
        wrong += [f"{page}: {entry['message']}" for entry in browser.get_log("browser")]
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        if wide > browser.execute_script("return window.innerWidth"):
            wrong.append(f"{page}: {wide} pixels wide, scrolls sideways at {width}")
    assert not wrong


@pytest.mark.slow
def test_search_finds_what_a_user_looks_for(browser: Any, served: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    browser.set_window_size(1400, 900)
    browser.get(f"{served}/")
    body = browser.find_element(By.TAG_NAME, "body")
    assert "RoIAlign" not in body.text
    body.send_keys("/")
    browser.switch_to.active_element.send_keys("RoIAlign", Keys.NULL)
    WebDriverWait(browser, 20).until(
        lambda driver: "RoIAlign" in driver.find_element(By.TAG_NAME, "body").text
    )
