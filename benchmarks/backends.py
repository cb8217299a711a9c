"""Compares ONNX Runtime with PyTorch on one image of 800 x 1333, with `comask bench`.

python benchmarks/backends.py BUNDLE

Further arguments are passed to `comask bench`; a further --backend is measured as well.
"""

from __future__ import annotations

import sys

from comask.cli.bench import main

ARGUMENTS = (
    "--backend", "torch", "--backend", "onnxruntime", "--size", "800x1333", "--runs", "5",
    "--no-record",
)  # fmt: skip

if __name__ == "__main__":
    main([*ARGUMENTS, *sys.argv[1:]])
