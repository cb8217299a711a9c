"""The old place of `comask.runtime.triton_model`, which repositories of an older comask import."""

from __future__ import annotations

from comask.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
