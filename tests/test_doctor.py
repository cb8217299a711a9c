"""`comask doctor`: what it says about an installation and a bundle, and when it fails."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature_ort
import pytest
from conftest import run

from comask.errors import BackendUnavailableError
from comask.kernels import compile as kernel_compile
from comask.runtime import doctor
from comask.runtime.backends.ort import OrtSession
from comask.runtime.doctor import Finding, diagnose


def finding(name: str) -> Finding:
    return next(f for f in diagnose() if f.name == name)


@pytest.fixture
def without_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an import fail as if with that error."""

    def forbid(module: str, error: Exception) -> None:
        real = importlib.import_module

        def fail(name: str, package: str | None = None) -> Any:
            if name == module:
                raise error
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", fail)

    return forbid


def test_this_machine_is_well() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "all is well" in result.output
    for name in ("python", "torch", "onnxruntime", "tensorrt-rtx", "kernels for the CPU", "av"):
        assert f"{name}: " in result.output


def test_every_lack_comes_with_a_fix() -> None:
    lacks = [f for f in diagnose() if f.status != "ok"]
    assert all(f.found and f.fix for f in lacks)


def test_json_holds_the_same(tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "doctor.json")
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["healthy"] is True
    for entry in content["findings"]:
        assert f"{entry['name']}: {entry['found']}" in result.output


def test_what_is_needed_and_absent_fails(without_module: Any) -> None:
    without_module("onnxruntime", ModuleNotFoundError("No module named 'onnxruntime'"))
    assert run("doctor").exit_code == 0
    result = run("doctor", "--need", "onnxruntime")
    assert result.exit_code == 1
    assert "1 to fix: onnxruntime" in result.output
    assert "pip install 'comask[ort]'" in result.output


def test_an_unknown_need_is_wrong_usage() -> None:
    result = run("doctor", "--need", "tensorflow")
    assert result.exit_code == 2
    assert "tensorrt-rtx" in result.output


@pytest.mark.parametrize(
    ("module", "error", "fix"),
    [
        ("torchvision", RuntimeError("operator torchvision::nms does not exist"), "matching pair"),
        ("torch", OSError("libcudart.so.13: cannot open shared object file"), "comask[train]"),
        ("onnxruntime", ImportError("libonnxruntime.so.1: undefined symbol"), "onnxruntime"),
    ],
)
def test_what_does_not_import_is_broken(
    without_module: Any, module: str, error: Exception, fix: str
) -> None:
    without_module(module, error)
    found = finding(module)
    assert found.status == "broken"
    assert str(error) in found.found
    assert fix in found.fix
    assert run("doctor").exit_code == 1


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    gpu = SimpleNamespace(name="H200", capability=90, driver=13000, memory=2**37)
    monkeypatch.setattr(doctor, "find_gpu_or_reason", lambda index=0: (gpu, ""))
    monkeypatch.setattr(doctor, "find_gpu", lambda index=0: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("torch").status == "broken"
    assert finding("gpu").found.startswith("H200, sm90, 128 GiB, driver for CUDA 13.0")
    assert finding("onnxruntime").fix.endswith("pip install 'comask[gpu]'")


def test_a_gpu_that_no_compiler_knows_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    gpu = SimpleNamespace(name="next", capability=999, driver=99000, memory=2**37)
    monkeypatch.setattr(doctor, "find_gpu", lambda index=0: gpu)
    assert finding("kernels for the GPU").status == "ok"


def installed(folder: Path, name: str, module: str) -> None:
    """Leaves in a folder what pip writes of a package."""
    about = folder / f"{name.replace('-', '_')}-9.9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    (about / "top_level.txt").write_text(f"{module}\n")


@pytest.mark.slow
def test_two_packages_of_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro_bundle: Path
) -> None:
    installed(tmp_path, "onnxruntime-gpu", "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "find_gpu", lambda index=0: None)
    version = importlib.metadata.version("onnxruntime")
    result = run("doctor")
    assert result.exit_code == 1
    assert re.search("to fix: .*onnxruntime", result.output)
    found = finding("onnxruntime")
    assert found.found.startswith(
        f"onnxruntime {version} and onnxruntime-gpu 9.9.9 overwrite each other; "
        f"what Python imports is {version}: "
    )
    assert "CPU" in found.found
    remove = "pip uninstall --yes onnxruntime onnxruntime-gpu; pip install"
    assert found.fix == f"{remove} 'comask[ort]'"
    with pytest.raises(
        BackendUnavailableError, match=re.escape(f"{remove} 'comask[gpu]'; or leav")
    ):
        OrtSession(micro_bundle / "stage2_roi_head.onnx", 0)


def test_packages_beside_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(tmp_path, "onnxruntime-genai", "onnxruntime_genai")
    monkeypatch.syspath_prepend(tmp_path)
    assert finding("onnxruntime").status == "ok"


DIAGNOSIS = """
import sys
from types import SimpleNamespace
from comask.runtime import doctor
gpu = SimpleNamespace(name="H200") if sys.argv[1] == "GPU" else None
doctor.find_gpu = lambda index=0: gpu
found = doctor.run_check("onnxruntime", doctor.CHECKS["onnxruntime"])
print(found.status, found.found, found.fix, sep="\\n")
"""


@pytest.mark.parametrize(
    ("without", "gpu", "status", "words"),
    [
        ("", "no GPU", "ok", "9.9.9: CUDA, CPU; its libraries of CUDA 12.8 load"),
        ("libcublas.", "no GPU", "ok", "CUDA 12.8 do not load: libcublas.so.12: cannot open"),
        ("libcublas.", "GPU", "broken", "CUDA 12.8 do not load: libcublas.so.12: cannot open"),
        ("libcudnn", "GPU", "broken", "CUDA 12.8 do not load: libcudnn.so.9: cannot open"),
    ],
)
def test_cuda_libraries_of_onnxruntime(
    tmp_path: Path, without: str, gpu: str, status: str, words: str
) -> None:
    done = miniature_ort.run_python(miniature_ort.make(tmp_path, without=without), DIAGNOSIS, gpu)
    assert done.returncode == 0, done.stderr
    told, found, fix = done.stdout.split("\n", 2)
    assert told == status
    assert words in found
    assert ("pip install 'comask[gpu]'" in fix) == bool(without)


def test_no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_compile.host_library.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    host, cuda = finding("kernels for the CPU"), finding("kernels for the GPU")
    assert (host.status, cuda.status) == ("absent", "absent")
    assert "falls back to torchvision" in host.found
    assert "g++" in host.fix
    assert "comask[gpu]" in cuda.fix


def test_a_whole_bundle(micro_bundle: Path) -> None:
    result = run("doctor", micro_bundle)
    assert result.exit_code == 0, result.output
    assert "have the manifest's hashes" in result.output


def test_a_damaged_bundle(micro_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(micro_bundle, copy)
    graph = copy / "stage2_roi_head.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    result = run("doctor", copy)
    assert result.exit_code == 1
    assert "BROKEN  stage2_roi_head.onnx" in result.output
    assert "altered since the export" in result.output
    assert run("doctor", tmp_path).exit_code == 1
