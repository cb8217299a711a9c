"""Trains a model on a data set, and writes checkpoints."""
