"""Writes bundles as model repositories of NVIDIA Triton Inference Server."""
