"""Says where the tree's parts lie; importing it needs nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"  # the stand-ins for driver and TensorRT
UPLOADED = (
    ROOT / "build" / "gpu-upload"
)  # the parts that `make gpu-upload` collects: 1, 2 and so on
WHEELS, BUNDLE = "wheels", "bundle"  # folders in a part
COMMIT = "commit"  # the file in a part that names the tree's commit


def paths(*first: Path) -> Mapping[str, str]:
    """Returns a PYTHONPATH that begins with these folders."""
    every = [*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(every)}
