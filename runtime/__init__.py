"""Runs a bundle over images: `Predictor.load("bundle/")(image)`.

Importing this needs numpy alone; each backend imports what it needs when it is opened.
"""

from comask.runtime.predictor import Predictor

from comask.structures import Detections

__all__ = ["Detections", "Predictor"]
