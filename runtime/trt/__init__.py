"""Runs engines of TensorRT and TensorRT-RTX with the same code."""
