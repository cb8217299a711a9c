"""`Tracker`: assigns ids that instances keep from frame to frame, with ByteTrack of `trackers`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import BackendUnavailableError
from comask.structures import Detections

LOST_SECONDS = 1.0  # An instance that is hidden for longer loses its id.


class Tracker:
    """Tracks the instances of one video by their boxes, regardless of their classes.

    ByteTrack (Zhang et al., 2022, arXiv:2110.06864): scores of at least `threshold` start tracks; lower
    scores may continue them.

    Args:
        threshold: the lowest score that starts a track.
        rate: approximate frames per second.

    Raises:
        BackendUnavailableError: `trackers` is not installed.
    """

    def __init__(self, threshold: float = 0.5, rate: Fraction | float = 25) -> None:
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise BackendUnavailableError(
                f"tracking needs the package trackers, which cannot be imported ({error}): "
                "pip install 'comask[track]'"
            ) from error
        self._tracker: Any = ByteTrackTracker(
            lost_track_buffer=round(30 * LOST_SECONDS),  # in thirtieths of a second
            frame_rate=float(rate),
            track_activation_threshold=threshold,
            high_conf_det_threshold=threshold,
        )

    def update(self, found: Detections, time: Fraction | float) -> NDArray[np.int64]:
        """Returns the id of each instance of the next frame, [N] i64; -1 until its second frame.

        Args:
            found: the frame's detections.
            time: the frame's time in seconds, greater than the previous one's.
        """
        import supervision

        tracked = self._tracker.update(
            supervision.Detections(
                xyxy=found.boxes_xyxy,
                confidence=found.scores,
                class_id=found.labels,
                data={"place": np.arange(len(found))},
            ),
            timestamp=float(time),
        )
        ids = np.full(len(found), -1, dtype=np.int64)
        if len(tracked):  # ByteTrack changes the order.
            ids[np.asarray(tracked.data["place"])] = np.asarray(tracked.tracker_id)
        return ids
