"""Runs a bundle over images: `Predictor.load("bundle/")(image)`.

Importing this needs numpy alone; each backend imports what it needs when it is opened.
"""

from comask.errors import FrameDroppedError, QueueFullError
from comask.runtime.dlpack import SharedArray
from comask.runtime.predictor import Predictor
from comask.runtime.session import Session, Stages, TensorSpec
from comask.runtime.stream import Future, StreamSession
from comask.structures import Detections

__all__ = [
    "Detections",
    "FrameDroppedError",
    "Future",
    "Predictor",
    "QueueFullError",
    "Session",
    "SharedArray",
    "Stages",
    "StreamSession",
    "TensorSpec",
]
