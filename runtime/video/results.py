"""`JsonLines`: one line of JSON a frame."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.errors import ComaskError, VideoError
from comask.files import is_folder_fault
from comask.runtime.session import Closing
from comask.runtime.video.source import SourceFrame
from comask.structures import Detections


class JsonLines(Closing):
    """Writes each frame as a line, which is whole in the file before the next frame comes.

    A line holds `frame` (number from 0), `pts` (time stamp as decoded, or null), `time` (seconds from
    the start), `width`, `height` and `detections`: COCO results whose `image_id` is the frame's number,
    with a `track_id` (null while there is none) where instances are tracked.

    Args:
        path: of the file, replaced where it exists.

    Raises:
        VideoError: when there can be no file of that name.
        ComaskError: when it cannot be written, here and in `add`.
    """

    wants_rle = True  # see `Sink`

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0
        try:
            self._file = path.open("wb", buffering=0)  # a line is one call to the system
        except OSError as error:
            raise self._unwritable(error) from error

    def add(
        self, frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
    ) -> None:
        """Writes one frame's line."""
        line = f"{json.dumps(frame_results(frame, found, track_ids))}\n".encode()
        try:
            if self._file.write(line) < len(line):  # as on a disk that is full
                self._file.truncate(self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end += len(line)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _unwritable(self, error: OSError) -> ComaskError:
        kind = ComaskError if is_folder_fault(error) else VideoError
        return kind(f"{self._path}: cannot be written: {error.strerror or error}")


def frame_results(
    frame: SourceFrame, found: Detections, track_ids: NDArray[np.int64] | None
) -> dict[str, Any]:
    """What a line of `JsonLines` holds.

    Args:
        frame: that was looked at.
        found: in it.
        track_ids: [N] i64, -1 where an instance has none yet; None where nothing is tracked.
    """
    height, width = found.image_size
    results = found.to_coco(image_id=frame.index)
    if track_ids is not None:
        for result, track_id in zip(results, track_ids.tolist(), strict=True):
            result["track_id"] = None if track_id < 0 else track_id
    return {
        "frame": frame.index,
        "pts": frame.pts,
        "time": float(frame.time),
        "width": width,
        "height": height,
        "detections": results,
    }
