"""Trains a model on a data set, and writes checkpoints."""

from comask.training.api import TrainingResult, train
from comask.training.callbacks import Callback

__all__ = ["Callback", "TrainingResult", "train"]
