"""CoMask instance segmentation from PyTorch to TensorRT; see `comask.runtime` to run a bundle."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("comask")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
