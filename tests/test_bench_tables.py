"""What `comask-bench` shows: tables for 80 columns, and pictures that say what the tables do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from comask.cli import bench_tables
from comask.cli.bench_plots import draw_sweep, draw_timing, top_of_losses
from comask.cli.bench_tables import HEADS, print_sweep, print_timing

MACHINE = {"cores": 2, "cpu": "CPU", "omp_num_threads": None, "gpu": None, "load": 0.5}
PARTS = {"prepare": 10.0, "stage1": 200.0, "stage2": 300.0, "other": 1.0, "results": 2.0,
         "encode": 40.0, "sum": 600.0}  # fmt: skip


def timing(*, stream: bool) -> dict[str, Any]:
    """Of two backends; medians of parts that do not add up to that of their sums."""
    found = {
        "milliseconds": {p: {"p50": v, "p90": 1.2 * v, "p99": 2 * v} for p, v in PARTS.items()},
        "images_per_second": 123.45, "ratio": 12.34, "outside_stages": 0.1234, "cores_busy": 15.5,
        "detections_per_image": 100.0, "resident_bytes": 20 << 30, "gpu_bytes": 20 << 30,
        "stream": None,
    }  # fmt: skip
    streamed = {"milliseconds": {"p50": 600.0}, "images_per_second": 123.4, "gpu_bytes": 20 << 30}
    return {
        "backends": {"torch": found, "tensorrt-rtx:fp16": found | {"stream": streamed}}
        if stream
        else {"torch": found},
        "batch": 1, "canvases": [], "subject": "noise", "runs": 5, "machine": MACHINE,
    }  # fmt: skip


def sweep(*losses: float) -> dict[str, Any]:
    """Settings that get slower as they lose less; all are on the front."""
    return {
        "settings": [
            {
                "backend": "tensorrt-rtx:fp16", "proposals": 1000, "short_side": 1333, "batch": 16,
                "box_ap": 100.0, "mask_ap": 99.9, "loss": loss, "ms_per_image": 999.0 + i,
                "ms_per_batch": 15999.0, "ratio": 12.34, "chosen": loss == 0, "on_front": True,
                "reference": loss == 0,
            }
            for i, loss in enumerate(losses)
        ],
        "images": 100, "not_decoded": 0, "data": "shapes", "skipped": [], "finished": True,
        "max_loss": 0.5, "verdict": "", "command": "", "python": "", "machine": MACHINE,
    }  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setattr(bench_tables, "console", lambda *, to_stderr: Console(width=80))


@pytest.mark.usefixtures("narrow")
def test_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_timing(timing(stream=True), to_stderr=False)
    print_sweep(sweep(20.0, 0.0), to_stderr=False)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("600.00", "1200", "123.45", "20480", "15999", "tensorrt-rtx:fp16"):
        assert text in out
    assert "as a stream of frames" in out
    print_timing(timing(stream=False), to_stderr=False)
    assert "stream" not in capsys.readouterr().out


def test_names_of_files_are_no_markup_and_no_formulas(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = timing(stream=False) | {"subject": "noise of [/x]\n$\\oops$"}
    print_timing(report, to_stderr=False)
    assert "noise of [/x] $\\oops$ on canvases" in capsys.readouterr().out
    draw_timing(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    return drawn


def test_bars_end_where_their_labels_say(figures: list[Figure], tmp_path: Path) -> None:
    draw_timing(timing(stream=True), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert len(axes.containers) == len(HEADS) - 1
    for place, label in enumerate(axes.texts):
        widths = [container[place].get_width() for container in axes.containers]
        assert sum(widths) == pytest.approx(PARTS["sum"])
        assert "600 ms" in label.get_text()
        assert widths[1] / widths[2] == pytest.approx(2 / 3)


def test_settings_beyond_the_axis_keep_their_number_and_the_front(
    figures: list[Figure], tmp_path: Path
) -> None:
    report = sweep(40.0, 30.0, 0.3, 0.0)
    draw_sweep(report, tmp_path / "a.png")
    (axes,) = figures[0].axes
    (front,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    top = top_of_losses(report)
    assert list(front.get_ydata()) == [top, top, 0.3, 0.0]
    assert axes.get_ylim()[1] == top
    places = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert places == {"1": (999, top), "2": (1000, top), "3": (1001, 0.3), "4": (1002, 0)}
