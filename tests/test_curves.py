"""The curves of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import metrics, write_run
from PIL import Image

from comask.training import figures
from comask.training.figures import draw_curves
from comask.training.record import RunRecord, read_evaluations


@pytest.mark.parametrize("evaluations", [0, 1, 12])
def test_curves_are_drawn(tmp_path: Path, evaluations: int) -> None:
    write_run(tmp_path, evaluations)
    written = draw_curves(tmp_path)
    drawn = ["losses.png", "ap.png", "second_stage.png"] if evaluations else ["losses.png"]
    assert [path.name for path in written] == drawn
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        # lines in colour, not only axes and text
        assert (np.ptp(pixels.astype(int), axis=1) > 60).sum() > 50, path
    assert draw_curves(tmp_path / "nowhere") == []


def test_curves_without_objects_are_drawn(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    nothing = metrics(-1, -1)
    record.add_metrics(1, 0, {"final": nothing})
    assert [path.name for path in draw_curves(tmp_path)] == ["ap.png"]
    record.add_metrics(2, 0, {"final": nothing, "first": nothing, "plain": nothing})
    assert [path.name for path in draw_curves(tmp_path)] == ["ap.png", "second_stage.png"]


def test_second_stage_is_shown_beside_what_it_started_from(tmp_path: Path) -> None:
    write_run(tmp_path, 2, box_gain=0.02, mask_gain=0.01)
    last = read_evaluations(tmp_path)[-1]
    assert figures.second_stage(last, "bbox") == pytest.approx(
        {"proposal": 48, "plain average": 49.5, "weighted average": 50}
    )
    assert figures.second_stage(last, "segm") == pytest.approx(
        {"coarse mask": 39, "final mask": 40}
    )
    masks, boxes = figures._second_stage(last).axes
    assert [bar.get_height() for bar in boxes.patches] == pytest.approx([48, 49.5, 50])
    assert [text.get_text() for text in masks.texts] == ["39.00", "40.00"]


def test_precision_axis_shows_differences(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    for step in (1, 2):
        record.add_metrics(step, 0, {"final": metrics(0.50 + step / 100, 0.50)})
    (axes,) = figures._precision(read_evaluations(tmp_path)).axes
    low, high = axes.get_ylim()
    assert 0 < low < 26  # AP50 is half of AP
    assert 52 < high < 55


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 50))
def test_smoothing_is_a_running_mean(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(figures._smoothed(np.array(values), window), expected, atol=1e-9)
