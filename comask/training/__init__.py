"""Trains a model on a data set, and writes checkpoints."""

from comask.evaluate import CocoMetrics
from comask.training.api import TrainingResult, train
from comask.training.callbacks import Callback
from comask.training.record import Step
from comask.training.validation import Validation

__all__ = ["Callback", "CocoMetrics", "Step", "TrainingResult", "Validation", "train"]
