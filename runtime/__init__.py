"""Runs a bundle over images: `Predictor.load("bundle/")(image)`.

Importing this package needs only numpy and typing_extensions; each backend imports what it needs when it
is opened.
"""

from comask.errors import FrameDroppedError, QueueFullError
from comask.runtime.backends.base import Stage, Stages, TensorSpec
from comask.runtime.dlpack import SharedArray
from comask.runtime.images import ImageResult
from comask.runtime.predictor import Predictor
from comask.runtime.stream import Future, StreamSession
from comask.structures import Detections

__all__ = [
    "Detections",
    "FrameDroppedError",
    "Future",
    "ImageResult",
    "Predictor",
    "QueueFullError",
    "SharedArray",
    "Stage",
    "Stages",
    "StreamSession",
    "TensorSpec",
]
