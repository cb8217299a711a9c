"""What ONNX Runtime runs a graph on: the provider that was asked for, or a warning."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import miniature_ort
import onnxruntime
import pytest

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError
from comask.runtime.backends import ort_install
from comask.runtime.backends.ort import CUDA_PROVIDER, OrtSession

CPU_PROVIDER = "CPUExecutionProvider"


def test_the_provider_is_named(micro_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    with caplog.at_level(logging.WARNING):
        assert OrtSession(micro_bundle / "stage2_roi_head.onnx").provider == CPU_PROVIDER
    assert caplog.text == ""


def test_a_fall_back_to_the_cpu_is_said(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with CUDA's libraries missing: ONNX Runtime itself goes on without a word."""
    if CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER]
    )
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match=CUDA_PROVIDER):
        session = OrtSession(micro_bundle / "stage2_roi_head.onnx")
    assert session.provider == CPU_PROVIDER
    (record,) = caplog.records
    assert CPU_PROVIDER in record.getMessage()
    assert CUDA_PROVIDER in record.getMessage()


SESSION = """
import logging, sys
from pathlib import Path
from comask.errors import BackendUnavailableError
from comask.runtime.backends.ort import OrtSession
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
try:
    OrtSession(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None)
except BackendUnavailableError as error:
    logging.error("%s", error)
"""


def said(folder: Path, *arguments: object) -> str:
    """What opening a session logs; it prints nothing."""
    done = miniature_ort.run_python(folder, SESSION, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_the_libraries_that_pip_installed_are_found(micro_bundle: Path, tmp_path: Path) -> None:
    text = said(miniature_ort.make(tmp_path), micro_bundle / "stage2_roi_head.onnx")
    assert f"{CUDA_PROVIDER} is in its build and was asked for, but does not start" in text
    assert "cannot open shared object file" not in text


@pytest.mark.parametrize("library", ["libcublasLt.so.12", "libcudnn.so.9"])
def test_the_library_that_is_missing_is_named(
    micro_bundle: Path, tmp_path: Path, library: str
) -> None:
    folder = miniature_ort.make(tmp_path, without=library)
    text = said(folder, micro_bundle / "stage2_roi_head.onnx")
    (warning,) = (line for line in text.splitlines() if line.startswith("WARNING"))
    assert f"does not start: {library}: cannot open shared object file" in warning
    assert "pip install 'comask[gpu]', which brings" in warning
    text = said(folder, micro_bundle / "stage2_roi_head.onnx", 0)
    (error,) = (line for line in text.splitlines() if line.startswith("ERROR"))
    assert f"GPU 0 was asked for, and CUDA cannot be used: {library}: cannot open" in error


def test_a_missing_driver_is_no_missing_package(micro_bundle: Path, tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a driver")
    text = said(miniature_ort.make(tmp_path, driver=True), micro_bundle / "stage2_roi_head.onnx")
    assert "does not start: libcuda.so.1: cannot open shared object file" in text
    assert "install NVIDIA's driver" in text
    assert "pip install" not in text


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Has CUDA in the build, and records in their order what is preloaded and which sessions start."""
    calls: list[object] = []
    start = onnxruntime.InferenceSession

    def record(*arguments: Any, providers: Any, **settings: Any) -> Any:
        calls.append([name for name, _ in providers])
        return start(*arguments, providers=[(CPU_PROVIDER, {})], **settings)

    ort_install._load_cuda_libraries.cache_clear()
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda directory: calls.append(directory), raising=False
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER]
    )
    yield calls
    ort_install._load_cuda_libraries.cache_clear()


def test_libraries_are_loaded_once_and_before_the_first_session(
    micro_bundle: Path, calls: list[object]
) -> None:
    for _ in range(2):
        OrtSession(micro_bundle / "stage2_roi_head.onnx")
    assert calls == ["", [CUDA_PROVIDER, CPU_PROVIDER], [CUDA_PROVIDER, CPU_PROVIDER]]


def test_a_cpu_alone_loads_none(
    micro_bundle: Path, calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    OrtSession(micro_bundle / "stage2_roi_head.onnx", "cpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU_PROVIDER])
    OrtSession(micro_bundle / "stage2_roi_head.onnx")
    assert calls == [[CPU_PROVIDER], [CPU_PROVIDER]]


def test_loading_may_fail(
    micro_bundle: Path, calls: list[object], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(directory: str) -> None:
        print("Failed to load", directory, end="\n\n")
        raise RuntimeError("the directory does not exist")

    monkeypatch.setattr(onnxruntime, "preload_dlls", fail, raising=False)
    with caplog.at_level(logging.INFO):
        assert OrtSession(micro_bundle / "stage2_roi_head.onnx").provider == CPU_PROVIDER
    assert "Failed to load; the directory does not exist" in caplog.text
    assert capsys.readouterr().out == ""
    print("as ever")
    assert capsys.readouterr().out == "as ever\n"


def test_what_cuda_raises_is_said(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A provider that cannot be made raises; ONNX Runtime would print that and take the CPU."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER]
    )
    real = onnxruntime.InferenceSession._create_inference_session
    text = (
        "cuda_call.cc:154 CudaCall CUDA failure 35: driver is insufficient ; GPU=-1 ; hostname=vm"
    )

    def create(self: Any, providers: Any, *rest: Any) -> None:
        if any(CUDA_PROVIDER in provider for provider in providers):
            self._fallback_providers = [CPU_PROVIDER]
            raise RuntimeError(text)
        real(self, providers, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", create)
    with caplog.at_level(logging.WARNING):
        assert OrtSession(micro_bundle / "stage2_roi_head.onnx").provider == CPU_PROVIDER
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "does not start: CUDA failure 35: driver is insufficient: check that nvidia-smi shows the "
        "GPU, and a driver for this version of CUDA"
    )
    with pytest.raises(BackendUnavailableError, match="CUDA failure 35: driver is insufficient: "):
        OrtSession(micro_bundle / "stage2_roi_head.onnx", 0)
    assert capsys.readouterr().out == ""


def test_an_empty_module_is_no_onnxruntime(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stays behind where one of two packages was removed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(
        BackendUnavailableError, match=r"module is empty.*: pip uninstall --yes onnx"
    ):
        OrtSession(micro_bundle / "stage2_roi_head.onnx")


def test_threads_without_work_do_not_spin(micro_bundle: Path) -> None:
    session = OrtSession(Bundle.open(micro_bundle).graph("stage1", "fp32"), "cpu")
    assert session._session is not None
    options = session._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
