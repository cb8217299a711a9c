"""The curves of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import metrics, write_run
from PIL import Image

from comask.training import curves
from comask.training.curves import draw_curves
from comask.training.record import RunRecord, read_evaluations


@pytest.mark.parametrize("evaluations", [0, 1, 12])
def test_curves_are_drawn(tmp_path: Path, evaluations: int) -> None:
    write_run(tmp_path, evaluations)
    written = draw_curves(tmp_path)
    drawn = ["losses.png", "ap.png", "collaboration.png"] if evaluations else ["losses.png"]
    assert [path.name for path in written] == drawn
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        # lines in colour, not only axes and text
        assert (np.ptp(pixels.astype(int), axis=1) > 60).sum() > 50, path
    assert draw_curves(tmp_path / "nowhere") == []


def test_curves_without_objects_are_drawn(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    record.add_metrics(1, 0, metrics(-1, -1), metrics(-1, -1))
    assert len(draw_curves(tmp_path)) == 2


def test_precision_axis_shows_differences(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    for step in (1, 2):
        record.add_metrics(step, 0, metrics(0.50 + step / 100, 0.50), metrics(0.50, 0.50))
    figure = curves._collaboration(read_evaluations(tmp_path))
    masks, boxes, mask_gain, box_gain = figure.axes
    assert masks.get_ylim() == (49, 51)
    assert boxes.get_ylim() == (49, 53)
    assert max(mask_gain.get_ylim()) >= 1  # no difference looks like none
    assert max(box_gain.get_ylim()) > 2


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 50))
def test_smoothing_is_a_running_mean(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(curves._smoothed(np.array(values), window), expected, atol=1e-9)
