"""Makes an environment with a server of S3 in it, beside this one: `install_s3.py REPORT`.

The server is moto's, which keeps its buckets in memory; with it go s3fs and a comask without
PyTorch that runs jobs. It is an environment of its own, so that the other tests see what happens
without s3fs. REPORT gets one line: the folder, or why the tests that need it must be skipped.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "moto[server]>=5",
    "s3fs>=2026.9",
    "fsspec>=2026.9",
    "pyarrow>=26",
    # this environment's, so that results can be equal
    f"onnxruntime=={importlib.metadata.version('onnxruntime')}",
    f"numpy=={importlib.metadata.version('numpy')}",
)


def install(folder: Path) -> str:
    """Makes the environment; says where it is, or what is in the way."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, *PACKAGES, "--editable", f"{ROOT}[ort]"],
    ):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            told = " ".join(done.stdout.split())[-200:]
            return f"no S3 server: {command[2]} cannot install it: {told}"
    return str(folder)


if __name__ == "__main__":
    report = Path(sys.argv[1])
    outcome = install(report.with_suffix(".venv").resolve())
    report.write_text(outcome + "\n")
    print(f"S3: {outcome}")
