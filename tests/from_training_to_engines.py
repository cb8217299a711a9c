"""The whole way of one network: trained, exported, quantised, compared on every backend, built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import int8_arguments, run, settings, write_own_truth


def go_from_training_to_engines(
    folder: Path, training: tuple[str, ...], exported: tuple[str, ...] = ()
) -> Path:
    """Trains with these settings and exports with those; returns the bundle."""
    run_folder, bundle, data = folder / "run", folder / "bundle", folder / "data"
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", run_folder,
                 *settings(*training))  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run("export", run_folder / "checkpoint-last.pt", "--output", bundle,
                 "--score-threshold", "0", "--precision", "fp32,fp16", "--limit", "2",
                 *settings(*exported))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fp32 graphs agree with PyTorch" in result.output
    assert "fp16 graphs agree with PyTorch" in result.output
    write_own_truth(bundle, data)
    result = run(*int8_arguments(bundle, data, "--max-loss", 100))
    assert result.exit_code == 0, result.output
    backends = [word for name in ("torch", "onnxruntime", "onnxruntime:int8", "openvino")
                for word in ("--backend", name)]  # fmt: skip
    result = run("eval", bundle, "--data", data, "--tolerance", "0.02", *backends, "--json",
                 folder / "eval.json")  # fmt: skip
    report = json.loads((folder / "eval.json").read_text())
    for backend in ("onnxruntime", "openvino"):
        assert report["comparisons"][backend]["passed"], result.output
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    result = run("build", bundle, "--engine", "tensorrt-rtx", "--precision", "fp32,fp16,int8")
    assert result.exit_code == 0, result.output
    assert result.output.count("stage1.plan: ") == 3
    return bundle
