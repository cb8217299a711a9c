"""CoMask instance segmentation, from PyTorch to TensorRT; `comask.runtime` runs exported bundles."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("comask")
except PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "0+unknown"
