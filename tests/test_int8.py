"""int8 graphs by the command: calibrated, within an AP budget or refused, and built as engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import int8_arguments, run
from onnx import numpy_helper

from comask.bundle import STAGES, Bundle, graph_file, sha256
from comask.calib.qdq import graph_layers
from comask.calib.quantize import CalibrationReport, add_int8
from comask.calib.speed import require_faster
from comask.calib.validation import Scorer, Validation
from comask.data.layouts import read_data_set
from comask.data.shapes import ShapesSource
from comask.errors import BackendUnavailableError, ParityError, PrecisionError
from comask.export.layer_precision import asked_precisions
from comask.export.verify import INT8_TOLERANCE, verification_batches, verify
from comask.runtime.backends.base import Stages
from comask.runtime.backends.ort import OrtSession, ort_stages
from comask.runtime.trt.engine_folder import find_engines
from comask.runtime.trt.flavor import load_flavor

INT8 = {graph_file(stage, "int8") for stage in STAGES}
RANGES = CalibrationReport(data="own", images=3, seed=0, method="minmax")


def test_the_bundle_gets_int8_graphs_and_their_story(int8_bundle: Path, own_truth: Path) -> None:
    manifest = Bundle.open(int8_bundle).manifest
    assert manifest.precisions == ("fp32", "fp16", "int8")
    for name in INT8:
        assert manifest.files[name] == sha256(int8_bundle / name)
    proof = manifest.verification["int8"]
    assert proof["float_layers"] == []
    assert proof["latency"] is None
    assert proof["calibration"] == {
        "data": str(own_truth), "images": 3, "seed": 0, "method": "error",
    }  # fmt: skip
    assert proof["reference"]["box"] > 50  # its own detections
    (trial,) = proof["trials"]
    assert trial["float_layers"] == 0
    assert trial["loss"] == pytest.approx(_loss(proof))
    assert trial["error"] == 0  # there are too few images to tell
    assert proof["bytes"]["int8"] < proof["bytes"]["fp16"]
    for stage in STAGES:
        half = onnx.load(int8_bundle / graph_file(stage, "fp16"))
        uses = sum(len(layer.nodes) for layer in graph_layers(half))
        asked = asked_precisions(onnx.load(int8_bundle / graph_file(stage, "int8")))
        assert list(asked.values()).count("int8") == uses
    assert "calibration.json" in {path.name for path in int8_bundle.iterdir()}


def _loss(proof: dict[str, Any]) -> float:
    return max(proof["reference"][task] - proof["ap"][task] for task in ("box", "mask"))


def test_it_runs_and_graphs_stay(int8_bundle: Path, own_truth: Path, tmp_path: Path) -> None:
    done = run("infer", int8_bundle, own_truth / "images", "--output", tmp_path, "--save", "coco",
               "--backend", "onnxruntime:int8")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "detections.json").read_text())
    plain = run("export", int8_bundle, "--precision", "fp16")
    assert plain.exit_code == 0, plain.output
    assert "holds fp16 graphs already; they stay" in plain.output


def test_another_method_replaces_it_without_another_calibration(
    int8_bundle: Path, own_truth: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    before = Bundle.open(folder).manifest
    done = run(*int8_arguments(folder, own_truth, "--max-loss", 100, "--calib-method", "minmax"))
    assert done.exit_code == 0, done.output
    assert "calibration.json: has 3 of 3 images" in done.output
    after = Bundle.open(folder).manifest
    assert after.precisions == before.precisions
    assert after.verification["int8"]["calibration"]["method"] == "minmax"
    for name in INT8:
        assert after.files[name] == sha256(folder / name) != before.files[name]


def test_what_must_be_kept_float_is_found(
    micro_fp16: Path, int8_bundle: Path, own_truth: Path, tmp_path: Path
) -> None:
    """One activation's range is spoilt; the search finds its layer and gives the reason."""
    bundle = Bundle.open(Path(shutil.copytree(micro_fp16, tmp_path / "bundle")))
    from comask.calib.cache import Calibration

    largest = Calibration.load(int8_bundle / "calibration.json").ranges("minmax")
    spoilt = largest | {"classifier.fc1": 1e4 * largest["classifier.fc1"]}
    source = read_data_set(own_truth, "val")
    sound = Bundle.open(int8_bundle).manifest.verification["int8"]
    validation = Validation(
        source=source, indices=list(range(len(source))), name="own", budget=max(_loss(sound), 0) + 5
    )
    lines: list[str] = []
    images = [source.image(i) for i in range(2)]
    scorer = Scorer(bundle, validation)
    found, made = add_int8(bundle, spoilt, images, scorer, calibration=RANGES, report=lines.append)
    proof = found.manifest.verification["int8"]
    assert "classifier.fc1" in {entry["layer"] for entry in proof["float_layers"]}
    assert len(proof["float_layers"]) < proof["layers"] / 2
    assert [entry["layer"] for entry in proof["float_layers"]] == [
        f.layer for f in made.float_layers
    ]
    first = proof["float_layers"][0]
    assert first["rank"] == 1
    assert "% noise to the predictions" in first["reason"]
    assert _loss(proof) <= validation.budget


def test_refusals(micro_fp16: Path, own_truth: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(micro_fp16, tmp_path / "bundle"))
    before = {path.name for path in folder.iterdir()}
    without = run("quantize", folder)
    assert without.exit_code == 2
    assert "Missing option '--calib-data'" in without.output
    for arguments, words in [
        (("--ap-budget", "1"), "--ap-budget belongs to a command of its own: comask quantize"),
        (("--precision", "int8"), "int8 graphs are made by: comask quantize BUNDLE"),
    ]:
        moved = run("export", folder, *arguments)
        assert (moved.exit_code, words in moved.output) == (2, True), moved.output
    # of these images the network knows nothing, which is seen before the calibration
    empty = run(*int8_arguments(folder, own_truth, "--data", "shapes", "--limit", 2))
    assert empty.exit_code == 1
    assert "a loss cannot be measured" in empty.output
    assert {p.name for p in folder.iterdir()} == before
    assert Bundle.open(folder).manifest.precisions == ("fp32", "fp16")


def test_int8_that_is_not_faster_is_refused() -> None:
    require_faster({"fp16": 2e-3, "int8": 1.9e-3}, "this GPU", "use fp16")
    with pytest.raises(PrecisionError, match=r"2\.00 ms per image, bf16 takes 2\.00 ms; use it"):
        require_faster({"fp32": 3e-3, "bf16": 2e-3, "int8": 2e-3}, "this processor", "use it")


@pytest.mark.parametrize("bf16", [2e-3, 4e-3])
def test_int8_must_be_faster_on_this_processor(
    micro_fp16: Path, own_truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: float
) -> None:
    measured = []

    def seconds(bundle: Bundle, int8: dict[str, Path], images: object) -> dict[str, float]:
        measured.append({stage: asked_precisions(onnx.load(path)) for stage, path in int8.items()})
        return {"fp32": 5e-3, "bf16": bf16, "int8": 3e-3}

    monkeypatch.setattr("comask.calib.quantize.measure_on_cpu", seconds)
    folder = Path(shutil.copytree(micro_fp16, tmp_path / "bundle"))
    arguments = [
        a for a in int8_arguments(folder, own_truth, "--max-loss", 100) if a != "--skip-cpu"
    ]
    done = run(*arguments)
    manifest = Bundle.open(folder).manifest
    if bf16 < 3e-3:
        assert done.exit_code == 1
        assert "int8 is not faster than bf16 on this processor" in done.output
        assert "--skip-cpu adds them for a GPU" in done.output
        assert manifest.precisions == ("fp32", "fp16")
        assert len(measured) == 1  # before the search
        return
    assert done.exit_code == 0, done.output
    proof = manifest.verification["int8"]
    assert proof["cpu_latency"] == {"fp32": 5e-3, "bf16": bf16, "int8": 3e-3}
    assert proof["processor"]
    assert "int8" in measured[-1]["stage1"].values()
    assert "not measured" not in done.output


@pytest.mark.parametrize("plugin", ["python", "none"])
def test_tensorrt_rtx_builds_it(int8_bundle: Path, tmp_path: Path, plugin: str) -> None:
    try:
        load_flavor("tensorrt-rtx")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    folder = shutil.copytree(int8_bundle, tmp_path / "bundle")
    sizes = [
        f"--profile={size}" for size in ("batch=1:1:2", "height=32:96:128", "width=32:128:128")
    ]
    done = run("build", folder, "--precision", "int8", "--engine", "tensorrt-rtx",
               "--plugin", plugin, *sizes)  # fmt: skip
    assert done.exit_code == 0, done.output
    (engines,) = find_engines(Bundle.open(Path(folder)))
    for stage in STAGES:
        layers = engines.info.layers[stage]
        assert layers.network["int8"] > 0.8 * layers.of
        assert set(layers.network) <= {"int8", "fp16"}


def test_graphs_that_do_not_get_smaller_are_refused(
    micro_fp16: Path, int8_bundle: Path, own_truth: Path, tmp_path: Path
) -> None:
    """Without a single range every layer stays float."""
    bundle = Bundle.open(Path(shutil.copytree(micro_fp16, tmp_path / "bundle")))
    source = read_data_set(own_truth, "val")
    scorer = Scorer(bundle, Validation(source=source, indices=[0, 1], name="own", budget=100))
    with pytest.raises(PrecisionError, match="int8 saves no space"):
        add_int8(bundle, {}, [source.image(0)], scorer, calibration=RANGES)
    assert {path.name for path in bundle.folder.iterdir()} == {p.name for p in micro_fp16.iterdir()}


# not of the last layers: before training their outputs are all alike
@pytest.mark.parametrize("layer", ["backbone.conv1", "mfpn.fpn.lateral.0"])
def test_an_engine_that_is_not_its_graph_would_be_refused(
    int8_bundle: Path, tmp_path: Path, layer: str
) -> None:
    """The tolerance of int8 engines, on a graph with one layer's scale doubled."""
    bundle = Bundle.open(int8_bundle)
    source = ShapesSource(num_images=2, seed=5)
    batches = verification_batches([source.image(0)], bundle.manifest.preprocess)[:1]
    sessions = []
    for stage in STAGES:
        model = onnx.load(bundle.graph(stage, "int8"))
        for tensor in model.graph.initializer:
            if tensor.name == f"model.{layer}.weight.scale":
                scaled = numpy_helper.to_array(tensor) * np.float16(2)
                tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
        sessions.append(OrtSession(model.SerializeToString(), "cpu", optimized=False))
    with ort_stages(bundle, "int8", "cpu") as sound:
        verify(sound, sound, batches, bundle.manifest.model, INT8_TOLERANCE)
        with pytest.raises(ParityError):
            verify(
                sound, Stages("wrong", *sessions), batches, bundle.manifest.model, INT8_TOLERANCE
            )
