"""All pages that commands write, in a real browser, opened as files: they show what they hold and fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium, faults, visit
from conftest import run
from data_sets import shapes_set
from made_results import HOSTILE, write_results
from made_runs import CATEGORIES, write_run

from comask.config import Config, ModelConfig
from comask.training.figures import draw_curves
from comask.training.report import write_report

pytestmark = pytest.mark.slow

ODD = "we ird #1% ünï"  # a folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def report_of_run(folder: Path, request: pytest.FixtureRequest) -> Path:
    write_run(folder, 3)
    draw_curves(folder)
    config = Config(model=ModelConfig(num_classes=3))
    return write_report(folder, config=config, categories=CATEGORIES, title=HOSTILE)


def report_of_trained_run(folder: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(request.getfixturevalue("micro_run"), folder, dirs_exist_ok=True)
    return folder / "report.html"


def report_of_backends(folder: Path, request: pytest.FixtureRequest) -> Path:
    bundle, page = request.getfixturevalue("micro_bundle"), folder / "report.html"
    result = run("eval", bundle, "--data", "shapes", "--limit", 4, "--report", page, "--backend",
                 "torch", "--backend", "onnxruntime")  # fmt: skip
    assert page.exists(), result.output
    return page


def page_of_data(folder: Path, request: pytest.FixtureRequest) -> Path:
    page = folder / "check.html"
    result = run("check", shapes_set(folder / "set"), "--page", page)
    assert page.exists(), result.output
    return page


PAGES: dict[str, Callable[[Path, pytest.FixtureRequest], Path]] = {
    "made run": report_of_run,
    "trained run": report_of_trained_run,
    "eval": report_of_backends,
    "check": page_of_data,
    "infer": lambda folder, request: write_results(folder),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_loads_nothing_from_elsewhere(
    browser: Any, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    page = PAGES[name](folder, request)
    wrong = []
    for width in (1400, 700, 360):
        for dark in (False, True):
            visit(browser, page, width=width, dark=dark)
            wrong += [f"{width}, dark={dark}: {fault}" for fault in faults(browser, folder)]
            ink, paper = (
                browser.execute_script(f"return getComputedStyle(document.body).{part}")
                for part in ("color", "backgroundColor")
            )
            assert (luma(ink) > luma(paper)) == dark
            assert abs(luma(ink) - luma(paper)) > 150
            assert browser.find_element("tag name", "h1").text
    assert not wrong


def luma(color: str) -> float:
    red, green, blue = (float(part) for part in color.strip("rgba()").split(",")[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<img src='http://127.0.0.1:9/x.png'>", "asks for http://127.0.0.1:9/x.png"),
        ("<img src='../x.png'>", "asks for file://"),
        ("<link rel=stylesheet href='https://example.invalid/x.css'>", "asks for https://example"),
        ("<script>fetch('other.json')</script>", "other.json"),
        ("<script>throw new Error('my fault')</script>", "my fault"),
        ("<div style='width: 2000px'>wide</div>", "scrolls sideways"),
        ("<img src='data:image/png;base64,xx'>", "cannot show data:"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(
    browser: Any, tmp_path: Path, body: str, fault: str
) -> None:
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title>x</title>{body}")
    visit(browser, tmp_path / "page.html", width=400)
    assert any(fault in found for found in faults(browser, tmp_path))
