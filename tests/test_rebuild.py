"""The command that builds engines again, as it is shown and as it is run."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from comask.cli import build
from comask.errors import EngineError
from comask.runtime.trt import engine_folder as rebuild_module
from comask.runtime.trt.engine_folder import (
    ENGINES,
    EngineFolder,
    EngineInfo,
    installed_command,
    rebuild,
    rebuild_arguments,
)


def test_rebuild_passes_the_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "workspace_mib": 512, "optimization_level": None, "version_compatible": False,
        "hardware_compatibility": "ampere_plus", "compute_capabilities": [86, 89],
    }  # fmt: skip
    info = EngineInfo(
        flavor="tensorrt", version="10.1", target="sm90", gpu="H200", driver=None, precision="fp16",
        plugin="aot", plugin_sha256=None, profile={"batch": (1, 2, 8), "height": (32, 64, 96)},
        options=options, graphs={}, transformed={}, plans={}, layers={}, seconds={},
        verification={}, created="", comask_version="",
    )  # fmt: skip
    assert rebuild_arguments(Path("my bundle"), info, info.profile) == [
        "my bundle", "--engine", "tensorrt", "--precision", "fp16", "--plugin", "aot",
        "--profile", "batch=1:2:8", "--profile", "height=32:64:96", "--workspace", "512",
        "--hardware-compatibility", "ampere_plus", "--compute-capability", "86",
        "--compute-capability", "89", "--rebuild",
    ]  # fmt: skip
    arguments = rebuild_arguments(Path("my bundle"), info, info.profile)
    parsed = build.main.make_context("build", arguments).params
    assert (parsed["rebuild"], parsed["engine"], parsed["plugin"]) == (True, "tensorrt", "aot")
    assert parsed["profile"] == ("batch=1:2:8", "height=32:64:96")
    assert parsed["workspace_mib"] == 512
    assert parsed["compute_capabilities"] == (86, 89)
    failing = [sys.executable, "-c", "print('a'); raise SystemExit('error: no nvcc')"]
    monkeypatch.setattr(rebuild_module, "installed_command", lambda: failing)
    with pytest.raises(
        EngineError, match=r"cannot be built again: a; error: no nvcc|error: no nvcc; a"
    ):
        rebuild(EngineFolder(tmp_path / "bundle" / ENGINES / "name", info), 0)


def test_the_installed_command_builds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    help_ = [*installed_command(), "build", "--help"]
    done = subprocess.run(help_, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--rebuild" in done.stdout
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: [])
    with pytest.raises(EngineError, match="which is not installed here"):
        installed_command()
