"""Ids that instances keep from frame to frame, by ByteTrack of the `trackers` package."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import BackendUnavailableError
from comask.structures import Detections

LOST_SECONDS = 1.0  # for which an instance may be hidden and keep its id


class Tracker:
    """Follows the instances of one video by their boxes, whatever their classes.

    ByteTrack (Zhang et al., 2022, arXiv:2110.06864): scores from `threshold` on start tracks, lower ones
    may continue them.

    Args:
        threshold: lowest score that starts a track.
        rate: frames a second, about.

    Raises:
        BackendUnavailableError: when `trackers` is not installed.
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
            lost_track_buffer=round(30 * LOST_SECONDS),  # counted in thirtieths of a second
            frame_rate=float(rate),
            track_activation_threshold=threshold,
            high_conf_det_threshold=threshold,
        )

    def update(self, found: Detections, time: Fraction | float) -> NDArray[np.int64]:
        """[N] i64: the id of each instance of the next frame, -1 until its second frame.

        Args:
            found: in the frame.
            time: of the frame in seconds, greater than the last one's.
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
        if len(tracked):  # its order is its own
            ids[np.asarray(tracked.data["place"])] = np.asarray(tracked.tracker_id)
        return ids
