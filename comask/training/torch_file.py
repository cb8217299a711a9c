"""Files of PyTorch, from anywhere: nothing in them is run, and none unpacks to more than it is."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch

from comask.errors import CheckpointError


def read_torch_file(path: Path) -> object:
    """What `torch.save` wrote, on the CPU.

    Raises:
        CheckpointError: when it cannot be read, holds pickled code, or is compressed, which `torch.save`
            never does and a few kilobytes that fill the memory are. The text does not name the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("is no file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(f"unpacks to {unpacked} bytes: PyTorch compresses no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of pickle; what cannot be read is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a broken stream makes an unpickler fail in any way
        raise CheckpointError(why_unreadable(error)) from error


def why_unreadable(error: Exception) -> str:
    """What went wrong while weights were loaded, in one line without PyTorch's advice to run code."""
    text = str(error).strip()
    blocked = re.search(r"GLOBAL (\S+)", text)
    if blocked:
        name = blocked[1]
        return f"it holds a pickled {name}, and code in files is never run: save its weights alone"
    if isinstance(error, OSError) and (error.filename or not error.strerror):  # no file, no network
        return error.strerror or text.splitlines()[0]
    # where torch's own words advise to load the file unsafely, the error's name must do
    detail = type(error).__name__ if not text or "weights_only" in text else text.splitlines()[0]
    return f"neither PyTorch's format nor safetensors, or cut short: {detail}"
