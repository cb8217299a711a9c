"""The display matrix of a video frame, as one of the eight ways to turn and mirror a picture."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comask.errors import VideoError
from comask.preprocess import Pixels

if TYPE_CHECKING:
    from av import VideoFrame

_TOLERANCE = math.sin(math.radians(1))  # FFmpeg also takes an angle within one degree for exact


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a decoded frame becomes upright: swap the axes first, then mirror them.

    Attributes:
        transposed: whether rows and columns change places.
        mirror_x: whether left and right change places, after `transposed`.
        mirror_y: whether top and bottom change places, after `transposed`.
    """

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def upright(self, pixels: Pixels) -> Pixels:
        """`pixels` (u8 [h, w, 3]) as a player shows them, in contiguous memory."""
        turned = pixels.transpose(1, 0, 2) if self.transposed else pixels
        turned = turned[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return np.ascontiguousarray(turned)


UPRIGHT = Orientation()


def frame_orientation(frame: VideoFrame) -> Orientation:
    """The orientation that a frame's display matrix states; `UPRIGHT` for a frame without one.

    Raises:
        VideoError: the matrix turns by an angle that is not a multiple of 90 degrees, or shears.
    """
    # not `frame.side_data`, which makes a circle of references: frames would wait for the collector
    from av.sidedata.sidedata import SideDataContainer

    container: Any = SideDataContainer  # whose stub lacks the argument
    matrix = container(frame).get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else orientation_from_matrix(bytes(matrix))


def orientation_from_matrix(content: bytes) -> Orientation:
    """The orientation that a display matrix stands for.

    The matrix maps a pixel (x, y) to (a·x + c·y, b·x + d·y), up to scale and shift (ISO/IEC 14496-12,
    track header; FFmpeg's libavutil/display.h). Players ignore the scale, and a matrix that maps an axis
    to nothing; so does this function.

    Args:
        content: nine i32 in the machine's byte order: a, b, u, c, d, v, x, y, w.

    Raises:
        VideoError: see `frame_orientation`.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", content[:36])
    lengths = math.hypot(a, b), math.hypot(c, d)
    if not all(lengths):
        return UPRIGHT
    a, b, c, d = a / lengths[0], b / lengths[0], c / lengths[1], d / lengths[1]
    if max(abs(b), abs(c)) < _TOLERANCE:
        return Orientation(mirror_x=a < 0, mirror_y=d < 0)
    if max(abs(a), abs(d)) < _TOLERANCE:
        return Orientation(transposed=True, mirror_x=c < 0, mirror_y=b < 0)
    raise VideoError(
        f"its display matrix turns the picture by {math.degrees(math.atan2(b, a)):.0f} degrees; only "
        f"multiples of 90 can be shown upright: rotate it by 'ffmpeg -i IN -c:v libx264 OUT', which "
        f"applies the matrix"
    )
