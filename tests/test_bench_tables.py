"""`comask bench`: its tables fit 80 columns, and its pictures show the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_reports import PARTS, latency_report, sweep_report
from matplotlib.figure import Figure
from rich.console import Console

from comask.cli import bench, sweep
from comask.cli.bench import print_latency
from comask.cli.sweep import print_sweep
from comask.runtime.bench.plots import draw_latency, draw_sweep, top_of_losses


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    for module in (bench, sweep):
        monkeypatch.setattr(module, "console", lambda *, to_stderr: Console(width=80))


@pytest.mark.usefixtures("narrow")
def test_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_latency(latency_report(stream=True), to_stderr=False)
    print_sweep(sweep_report(20.0, 0.0), to_stderr=False)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("600.00", "1200", "123.45", "20480", "15999", "tensorrt-rtx:fp16"):
        assert text in out
    assert "as a stream of frames" in out
    print_latency(latency_report(stream=False), to_stderr=False)
    assert "stream" not in capsys.readouterr().out


def test_names_of_files_are_no_markup_and_no_formulas(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = latency_report(stream=False, subject="noise of [/x]\n$\\oops$")
    print_latency(report, to_stderr=False)
    assert "noise of [/x] $\\oops$ on canvases" in capsys.readouterr().out
    draw_latency(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    return drawn


def test_bars_end_where_their_labels_say(figures: list[Figure], tmp_path: Path) -> None:
    draw_latency(latency_report(stream=True), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert len(axes.containers) == len(PARTS) - 1
    for place, label in enumerate(axes.texts):
        widths = [container[place].get_width() for container in axes.containers]
        assert sum(widths) == pytest.approx(PARTS["sum"])
        assert "600 ms" in label.get_text()
        assert widths[1] / widths[2] == pytest.approx(2 / 3)


def test_settings_beyond_the_axis_keep_their_number_and_the_front(
    figures: list[Figure], tmp_path: Path
) -> None:
    report = sweep_report(40.0, 30.0, 0.3, 0.0)
    draw_sweep(report, tmp_path / "a.png")
    (axes,) = figures[0].axes
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    top = top_of_losses(report)
    assert list(front.get_ydata()) == [top, top, 0.3, 0.0]
    assert axes.get_ylim()[1] == top
    places = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert places == {"1": (999, top), "2": (1000, top), "3": (1001, 0.3), "4": (1002, 0)}
