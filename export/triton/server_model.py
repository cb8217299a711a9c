"""Where repositories that an older comask wrote look for `comask.runtime.triton_model`."""

from __future__ import annotations

from comask.runtime.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
