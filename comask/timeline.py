"""Counts the detections of a video over time, in memory that does not grow with the video."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.structures import Detections

_BINS = 256  # at most; from half as many on, whatever the length
STEPS = 100  # of scores, from 0 to 1
_SCORES = np.arange(STEPS + 1, dtype=np.float32) / np.float32(STEPS)


class Timeline:
    """The number of detections by class and score in equal parts of a video's time.

    A part is one frame wide at first. When the parts are used up, each two neighbours become one.

    Args:
        step: seconds between two frames, roughly.

    Attributes:
        frames: the number of frames.
        seconds: the time of the last one.
        best: the highest score of each label.
    """

    def __init__(self, step: Fraction) -> None:
        self._step, self._joined = step, 1  # frames in a part
        self._frames = np.zeros(_BINS, np.int64)
        self._counts: dict[int, NDArray[np.int32]] = {}  # by label: [parts, steps]
        self.frames = 0
        self.seconds = Fraction(0)
        self.best: dict[int, float] = {}

    def add(self, time: Fraction, found: Detections) -> None:
        """Counts a frame.

        Args:
            time: seconds from the start of the video, at least 0 and rising.
            found: the frame's detections.
        """
        # Times are rounded, as a container stores them, and so must not decide between two parts.
        place = round(time / self._step)
        while place // self._joined >= _BINS:
            self._halve()
        part = place // self._joined
        self._frames[part] += 1
        steps = np.searchsorted(_SCORES, found.scores, side="right") - 1
        for label in np.unique(found.labels).tolist():
            chosen = found.labels == label
            counts = self._counts.setdefault(label, np.zeros((_BINS, STEPS + 1), np.int32))
            np.add.at(counts[part], steps[chosen], 1)
            self.best[label] = max(self.best.get(label, 0.0), float(found.scores[chosen].max()))
        self.frames += 1
        self.seconds = time

    def _halve(self) -> None:
        self._joined *= 2
        arrays: list[NDArray[Any]] = [self._frames, *self._counts.values()]
        for counts in arrays:
            counts[: _BINS // 2] = counts.reshape(_BINS // 2, 2, *counts.shape[1:]).sum(axis=1)
            counts[_BINS // 2 :] = 0

    def content(self) -> dict[str, Any]:
        """Returns the counts for JSON.

        Returns:
            `width` and `start`, the seconds of a part and the start of the first; `frames` of each part;
            and `counts` by label: the part, the score in steps of 1 / `STEPS`, rounded down, and the
            number of detections, one after the other, where there are any.
        """
        width = self._step * self._joined
        last = int(np.flatnonzero(self._frames)[-1]) if self.frames else -1
        return {
            "width": float(width),
            "start": float(-self._step / 2),
            "frames": self._frames[: last + 1].tolist(),
            "counts": {label: _cells(counts) for label, counts in sorted(self._counts.items())},
        }


def _cells(counts: NDArray[np.int32]) -> list[int]:
    parts, steps = np.nonzero(counts)
    cells: list[int] = np.stack((parts, steps, counts[parts, steps]), axis=1).ravel().tolist()
    return cells
