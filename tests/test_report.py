"""The page that shows a run."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import CATEGORIES, metrics, write_run
from PIL import Image

from comask.config import Config, ModelConfig
from comask.training.figures import draw_curves
from comask.training.record import RunRecord
from comask.training.report import write_report


class Page(HTMLParser):
    """The images and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.source, self.text = path.read_text(), ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name == "src"]
        self.links += [value or "" for name, value in attributes if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def report(folder: Path, **model: Any) -> Page:
    config = Config(model=ModelConfig(num_classes=3, **model))
    return Page(write_report(folder, config=config, categories=CATEGORIES, title="run <i>"))


def test_report_holds_everything(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    draw_curves(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for step in (10, 999990, 1000000):
        Image.new("RGB", (4, 4), (step % 255, 0, 0)).save(pictures / f"step-{step:06d}.png")
    page = report(tmp_path)
    shown = [tmp_path / name for name in ("second_stage.png", "ap.png", "losses.png")]
    shown.append(pictures / "step-1000000.png")
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    assert [base64.b64decode(source.removeprefix(prefix)) for source in page.sources] == [
        path.read_bytes() for path in shown
    ]
    assert page.links == ["pictures/step-999990.png", "pictures/step-000010.png"]
    assert all((tmp_path / link).exists() for link in page.links)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not page.tags & {"b", "i", "script", "link"}
    for text in ("<b>&", "run <i>", "mask 40.0, box 50.0", "25.0 %", "msfem_branches", "AR100"):
        assert text in page.text, text
    assert "Weighting the cells by the mask changes box AP by +0.50 points" in page.text
    words = " ".join(page.text.split())
    assert (
        "box AP, proposal 48.00 box AP, plain average 49.50 box AP, weighted average 50.00" in words
    )
    assert not list(tmp_path.glob(".*"))


def test_report_is_honest(tmp_path: Path) -> None:
    stages = {"final": metrics(0.49, 0.4), "first": metrics(0.5, 0.4), "plain": metrics(0.495, 0.4)}
    RunRecord(tmp_path, keep_until=0).add_metrics(20, 1, stages)
    assert "changes box AP by -0.50 points" in report(tmp_path).text


def test_report_of_a_run_that_found_nothing(tmp_path: Path) -> None:
    nothing = metrics(0, 0)
    stages = {"final": nothing, "first": nothing, "plain": nothing}
    RunRecord(tmp_path, keep_until=0).add_metrics(20, 1, stages)
    text = report(tmp_path).text
    assert "The model detects nothing yet." in text
    assert "changes box AP" not in text


@pytest.mark.parametrize(
    ("collaboration", "words"),
    [("uniform", "All cells have equal weight"), ("fc_reg", "branch regresses the boxes")],
)
def test_report_names_what_refines(tmp_path: Path, collaboration: str, words: str) -> None:
    write_run(tmp_path, 1)
    text = report(tmp_path, collaboration=collaboration).text
    assert f"model.collaboration={collaboration}" in text
    assert words in text
    assert "Weighting the cells" not in text


def test_report_of_a_young_run(tmp_path: Path) -> None:
    assert "No step yet." in report(tmp_path).text
    write_run(tmp_path, 0)
    page = report(tmp_path)
    assert "No evaluation yet." in page.text
    assert "last step" in page.text
    assert not page.sources
    record = RunRecord(tmp_path, keep_until=10)
    nothing = metrics(-1, -1)
    record.add_metrics(10, 0, {"final": nothing})
    assert "What the second stage adds" not in report(tmp_path).text  # not before a run's end
    record.add_metrics(20, 0, {"final": nothing, "first": nothing, "plain": nothing})
    words = "The gain cannot be measured, since the validation data holds no objects."
    assert words in report(tmp_path).text
