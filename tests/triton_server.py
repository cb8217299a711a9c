"""A real Triton server for tests, whose client is imported from its environment."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE_MODEL = Path(__file__).with_name("triton_stage.py")
REPORT = Path(sys.prefix) / "triton"  # of install_tritonserver.py
SECONDS = 60  # that the server may take to be ready


@dataclass(frozen=True)
class Installation:
    """A server.

    Attributes:
        program: of the server.
        backends: their folder.
        python: of the environment that its Python models run in.
        packages: that a client needs.
    """

    program: Path
    backends: Path
    python: Path
    packages: Path


def find_server() -> Installation:
    """$COMASK_TRITONSERVER, which runs with this environment, or what install_tritonserver.py made."""
    if named := os.environ.get("COMASK_TRITONSERVER"):
        program = Path(named)
        here = Path(str(sysconfig.get_path("purelib")))
        return Installation(program, program.parents[1] / "backends", Path(sys.executable), here)
    told = REPORT.read_text().strip() if REPORT.is_file() else ""
    if not Path(told).is_absolute():
        pytest.skip(
            told or "no Triton server: make test, or tests/install_tritonserver.py, gets one"
        )
    (packages,) = Path(told).glob("lib/python3*/site-packages")
    server = packages / "pytriton" / "tritonserver"
    python = Path(told) / "bin" / "python"
    return Installation(server / "bin" / "tritonserver", server / "backends", python, packages)


def stand_in_stages(installation: Installation, repository: Path) -> None:
    """Has ONNX Runtime in Python run the stages' files where the server has no such backend."""
    if (installation.backends / "onnxruntime").is_dir():
        return
    for folder in repository.glob("*_stage?"):
        config = folder / "config.pbtxt"
        text = config.read_text()
        assert 'platform: "onnxruntime_onnx"' in text
        config.write_text(text.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
        shutil.copy(STAGE_MODEL, folder / "1" / "model.py")


@contextmanager
def serving(installation: Installation, repositories: Sequence[Path], log: Path) -> Iterator[str]:
    """The address of a server that is ready; its log is part of the error where it never is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{installation.python.parent}:{os.environ['PATH']}",
        # where the Python that made the environments has its library
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
    }
    command = [
        installation.program, *(f"--model-repository={folder}" for folder in repositories),
        "--backend-directory", installation.backends,
        "--http-address", "127.0.0.1", "--http-port", str(port),
        # loading at once, its Python backend may end with boost::interprocess::lock_exception
        "--model-load-thread-count", "1",
        "--allow-grpc", "false", "--allow-metrics", "false", "--exit-timeout-secs", "5",
    ]  # fmt: skip
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            deadline = time.monotonic() + SECONDS
            while not _ready(port):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def _ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
