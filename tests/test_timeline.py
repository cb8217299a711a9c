"""Timelines of videos: every detection is counted once, however long the video is."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comask.structures import Detections
from comask.timeline import Timeline


def frame(labels: list[int], scores: list[float]) -> Detections:
    return Detections(
        boxes_xyxy=np.zeros((len(labels), 4), np.float32),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        mask_probs=np.zeros((len(labels), 28, 28), np.float32),
        image_size=(10, 10),
    )


@given(
    st.lists(
        st.tuples(
            st.integers(1, 90),
            st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100)), max_size=3),
        ),
        max_size=60,
    )
)
def test_a_timeline_counts_every_detection_once(
    frames: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    """Against counters, at times with gaps; each part is equally wide."""
    line, step, index = Timeline(Fraction(1, 25)), Fraction(1, 25), -1
    expected: Counter[tuple[int, int, int]] = Counter()
    places = []
    for gap, found in frames:
        index += gap
        line.add(index * step, frame([a for a, _ in found], [b / 100 for _, b in found]))
        places.append(index)
    joined = 1
    while places and places[-1] // joined >= 256:
        joined *= 2
    for place, (_, found) in zip(places, frames, strict=True):
        expected.update((label, place // joined, score) for label, score in found)
    content = json.loads(json.dumps(line.content()))
    got = Counter(
        {
            (int(label), cells[i], cells[i + 1]): cells[i + 2]
            for label, cells in content["counts"].items()
            for i in range(0, len(cells), 3)
        }
    )
    assert got == expected
    assert sum(content["frames"]) == line.frames == len(frames)
    assert content["width"] == pytest.approx(joined / 25)
    assert len(content["frames"]) == (places[-1] // joined + 1 if places else 0)
    best = {
        label: max(b for _, f in frames for a, b in f if a == label) / 100
        for label in {a for _, f in frames for a, _ in f}
    }
    assert line.best == pytest.approx(best)


def test_times_that_a_container_rounded_give_one_frame_a_part() -> None:
    line = Timeline(Fraction(1001, 30000))
    for index in range(200):
        line.add(Fraction(round(index * 1001 / 30), 1000), frame([], []))
    assert line.content()["frames"] == [1] * 200


def test_scores_fall_into_the_steps_of_the_slider() -> None:
    """A score belongs to the highest step that it reaches, as `drawn` compares."""
    for step in range(101):
        line = Timeline(Fraction(1))
        line.add(Fraction(0), frame([0], [step / 100]))
        assert line.content()["counts"] == {0: [0, step, 1]}
        assert frame([0], [step / 100]).reach(step / 100).all()
    line = Timeline(Fraction(1))
    line.add(Fraction(0), frame([0, 0], [0.4999, 0.999]))
    assert line.content()["counts"] == {0: [0, 49, 1, 0, 99, 1]}


def test_each_class_has_its_threshold() -> None:
    one = frame([0, 1, 2, 0, 1, 2], [0.5, 0.5, 0.5, 0.1, 0.1, 0.1])
    assert one.reach((0.5, 0.6, 0.05)).tolist() == [True, False, True, False, False, True]
    assert one.reach(0.3).tolist() == [True, True, True, False, False, False]
    assert one[:0].reach((0.5, 0.6, 0.05)).tolist() == []
