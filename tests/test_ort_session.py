"""What ONNX Runtime runs a graph on: the provider that was asked for, or a warning."""

from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime
import pytest

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
