"""`comask eval`: broken graphs and pipelines fail, and the report names what is wrong with them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run
from evaluated import edit_manifest, entry, evaluate
from markupsafe import escape
from onnx import helper, numpy_helper
from pycocotools import mask as coco_mask

from comask.bundle import Bundle, sha256
from comask.cli.options import SHAPES_SEED
from comask.data.shapes import ShapesSource
from comask.evaluate import METRICS, CocoMetrics, Truth
from comask.masks import paste_masks
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.parity.evaluation import Evaluation, busiest
from comask.runtime.parity.scores import Scores, image_results
from comask.runtime.parity.verdict import ap_tolerance, compare_ap


def broken(
    bundle: Path, output: Path, name: str, change: Callable[[onnx.ModelProto], None]
) -> Path:
    """A copy of a bundle with one graph changed and its hash put right."""
    shutil.copytree(bundle, output)
    graph = onnx.load(output / name)
    change(graph)
    onnx.save(graph, output / name)
    edit_manifest(output, lambda values: values["files"].update({name: sha256(output / name)}))
    return output


def scale(tensor: str, factor: float = 1.5) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (found,) = (entry for entry in model.graph.initializer if entry.name == tensor)
        value = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array(value * value.dtype.type(factor), tensor))

    return change


def without_relu(model: onnx.ModelProto) -> None:
    """Takes the ReLU between two layers of the classifier away."""
    weights = ("model.classifier.fc1.weight", "model.classifier.fc1.weight.dequantized")
    (fc1,) = (n for n in model.graph.node if len(n.input) > 1 and n.input[1] in weights)
    (relu,) = (n for n in model.graph.node if fc1.output[0] in n.input)
    relu.op_type = "Identity"


def scale_of_input(layer: str) -> Callable[[onnx.ModelProto], None]:
    """1.5 times the scale by which an int8 layer's input is rounded."""

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if f"model.{layer}.weight.dequantized" in n.input)
        scale(node.input[0].removesuffix(".dequantized") + ".scale")(model)

    return change


def reverse_channels(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "images":
                node.input[place] = "images.bgr"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "reversed"))
    gather = helper.make_node("Gather", ["images", "reversed"], ["images.bgr"], axis=3)
    model.graph.node.insert(0, gather)


@pytest.mark.parametrize(
    ("layer", "graph"),
    [
        # behind it, a branch that is almost 0
        ("backbone.layer2.0.conv1", "stage1_proposals.onnx"),
        ("rpn.deltas", "stage1_proposals.onnx"),
        ("head.refine.3", "stage2_roi_head.onnx"),  # a GroupNorm behind it cancels the factor
    ],
)
def test_a_scaled_weight_is_named(
    micro_bundle: Path, tmp_path: Path, layer: str, graph: str
) -> None:
    bundle = broken(micro_bundle, tmp_path / "bundle", graph, scale(f"model.{layer}.weight"))
    code, report, page = evaluate(bundle, tmp_path)
    assert code == 1
    first = report["traces"]["onnxruntime"]["first"]
    assert (first["layer"], first["side"]) == (layer, "output")
    assert first["relative"] > 0.3
    cause, weights = report["comparisons"]["onnxruntime"]["failures"][:2]
    assert f"first tensor that diverges: {layer} output" in cause
    assert f"{layer}.weight" in weights
    assert f"first tensor that diverges: {layer} output" in page
    # recorded, and shown
    result = run("doctor", bundle)
    assert result.exit_code == 1
    assert "parity of onnxruntime on shapes: box AP 0.00 (+0.00)" in result.output
    assert "FAILED" in result.output


def test_one_number_of_a_weight_is_enough(micro_bundle: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (found,) = (
            t for t in model.graph.initializer if t.name == "model.mfpn.fpn.lateral.1.weight"
        )
        value = numpy_helper.to_array(found).copy()
        value[np.unravel_index(np.abs(value).argmax(), value.shape)] *= 1.5
        found.CopyFrom(numpy_helper.from_array(value, found.name))

    bundle = broken(micro_bundle, tmp_path / "bundle", "stage1_proposals.onnx", change)
    code, report, _ = evaluate(bundle, tmp_path)
    assert code == 1
    assert any("fpn.lateral.1.weight" in text
               for text in report["comparisons"]["onnxruntime"]["failures"])  # fmt: skip


def test_an_operation_between_layers_is_told_from_a_layer(
    micro_bundle: Path, tmp_path: Path
) -> None:
    bundle = broken(micro_bundle, tmp_path / "bundle", "stage2_roi_head.onnx", without_relu)
    code, report, _ = evaluate(bundle, tmp_path)
    assert code == 1
    first = report["traces"]["onnxruntime"]["first"]
    assert (first["layer"], first["side"]) == ("classifier.fc2", "input")
    assert report["weights"]["onnxruntime"] == []


def test_reversed_channels_are_named(micro_bundle: Path, tmp_path: Path) -> None:
    bundle = broken(micro_bundle, tmp_path / "bundle", "stage1_proposals.onnx", reverse_channels)
    code, report, page = evaluate(bundle, tmp_path)
    assert code == 1
    cause = report["comparisons"]["onnxruntime"]["failures"][0]
    assert "preprocessing differs" in cause
    assert "BGR where RGB is expected" in cause
    assert "BGR where RGB is expected" in page


@pytest.mark.parametrize(
    ("graph", "change", "words"),
    [
        ("stage1_proposals.int8.onnx", reverse_channels, "BGR where RGB is expected"),
        ("stage2_roi_head.int8.onnx", without_relu, "diverges: classifier.fc2 input (stage2)"),
        ("stage2_roi_head.int8.onnx", scale("model.head.refine.3.weight.scale"),
         "head.refine.3.weight in stage2 is not the network's"),
        ("stage1_proposals.int8.onnx", scale("model.rpn.conv.weight.scale"),
         "rpn.conv.weight in stage1 is not the network's"),
        ("stage1_proposals.int8.onnx", scale_of_input("rpn.conv"), "stage1: the input of rpn.conv"),
        ("stage2_roi_head.int8.onnx", scale_of_input("head.refine.3"),
         "stage2: the input of head.refine.3"),
    ],
)  # fmt: skip
def test_a_fault_in_int8_is_named_whatever_ap_says(
    int8_bundle: Path, tmp_path: Path, graph: str, change: Any, words: str
) -> None:
    """The budget is 100 points here, so AP passes."""
    bundle = broken(int8_bundle, tmp_path / "bundle", graph, change)
    code, report, page = evaluate(
        bundle, tmp_path, "--backend", "torch", "--backend", "onnxruntime:int8"
    )
    assert code == 1
    found = report["comparisons"]["onnxruntime:int8"]
    assert found["largest"] <= found["tolerance"] == 100
    assert words in found["failures"][0]
    assert escape(words) in page


def test_sound_int8_passes_and_its_story_is_told(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    kept = {"layer": "rpn.conv", "reason": "for a test"}
    edit_manifest(bundle, lambda v: v["verification"]["int8"]["float_layers"].append(kept))
    island = {"module": "mfpn.fpn", "largest": 7e4, "image": "a.jpg", "reason": "reached 7e4"}
    edit_manifest(bundle, lambda v: v["verification"]["fp16"]["float_layers"].append(island))
    code, report, page = evaluate(bundle, tmp_path)
    assert code == 0, report["comparisons"]
    trace = report["traces"]["onnxruntime:int8"]
    assert (trace["first"], trace["limit"]) == (None, 0.01)
    assert len(trace["differences"]) > 100
    for words in ("Quantization to int8", "for a test", "3 images of", "reached 7e4"):
        assert words in page
    result = run("doctor", bundle)
    assert result.exit_code == 0, result.output
    proof = report["verification"]["int8"]
    assert (
        f"int8 graphs: {proof['layers'] - 1} of {proof['layers']} layers in int8, float: rpn.conv;"
        in result.output
    )
    assert "fp16 graphs: stay f32: mfpn.fpn" in result.output


def test_scales_without_their_calibration_are_not_compared(
    int8_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    (bundle / "calibration.json").unlink()
    result = run("eval", bundle, "--data", "shapes", "--limit", 1, "--no-record",
                 "--backend", "torch", "--backend", "onnxruntime:int8")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: the scales of int8 activations are not compared" in result.output


def metrics(ap: float) -> CocoMetrics:
    values = {task: dict.fromkeys(METRICS, ap) for task in ("bbox", "segm")}
    classes = {task: {"circle": ap} for task in values}
    return CocoMetrics(values=values, per_class=classes, images=1, detections=1)


@pytest.mark.parametrize(
    ("kind", "points", "passes"),
    [
        ("fp32", 0.2, False),
        ("fp32", -0.2, False),
        ("fp16", 0.2, True),
        ("fp16", -0.2, False),
        ("int8", 2.0, True),
        ("int8", -0.9, True),  # within its budget
        ("int8", -1.1, False),
        ("results", 0.2, False),
    ],
)
def test_what_rounds_may_gain_and_int8_may_lose_its_budget(
    micro_bundle: Path, kind: str, points: float, passes: bool
) -> None:
    manifest = Bundle.open(micro_bundle).manifest
    manifest = dataclasses.replace(manifest, verification={"int8": {"budget": 1.0}})
    tolerance = ap_tolerance(manifest, kind)
    found = compare_ap(metrics(0.5 + points / 100), metrics(0.5), kind, tolerance)
    assert (found.failures == []) is passes
    assert found.deltas["segm"]["AP"] == pytest.approx(points)


def test_what_computes_nan_is_traced_to_its_layer(micro_bundle: Path, tmp_path: Path) -> None:
    graph = "stage1_proposals.onnx"
    bundle = broken(
        micro_bundle, tmp_path / "bundle", graph, scale("model.rpn.conv.weight", np.nan)
    )
    code, report, page = evaluate(
        bundle, tmp_path, "--backend", "torch", "--backend", "onnxruntime"
    )
    assert code == 1
    first, *_ = failures = report["comparisons"]["onnxruntime"]["failures"]
    assert "rpn.conv" in first
    assert any("are not finite" in failure for failure in failures)
    assert report["backends"]["onnxruntime"]["detections"] == 0
    assert "NaN" not in (tmp_path / "report.json").read_text()  # which is no JSON
    assert "are not finite" in page


def test_one_backend_alone_is_scored_only(micro_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    code, report, page = evaluate(bundle, tmp_path, "--backend", "onnxruntime")
    assert code == 1
    assert report["failures"] == []
    assert report["not_judged"].startswith("nothing to compare it with")
    assert "SCORED" in page
    assert "FAIL" not in page
    assert "onnxruntime: nothing to compare it with" in page
    assert Bundle.open(bundle).manifest.parity == []


def test_a_network_that_finds_nothing_is_not_judged(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comask.runtime.parity.scores.coco_results", lambda *_: [])
    bundle = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    done = run("eval", bundle, "--data", "shapes", "--limit", 2, "--report", tmp_path / "r.html")
    assert done.exit_code == 1
    assert "NOT JUDGED torch: the reference found nothing in these images: train" in done.output
    assert "FAIL" not in done.output
    page = (tmp_path / "r.html").read_text()
    assert "NOT JUDGED" in page
    assert "FAIL" not in page
    told = run("doctor", bundle)
    assert told.exit_code == 0, told.output
    assert "absent  parity on shapes: nothing was compared" in told.output


def test_what_others_wrote_meanwhile_stays(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, plain = Path(shutil.copytree(micro_bundle, tmp_path / "bundle")), Evaluation.run

    def with_company(*arguments: Any) -> Any:
        edit_manifest(bundle, lambda values: values.update(latency={"another": {"images": 1}}))
        return plain(*arguments)

    monkeypatch.setattr(Evaluation, "run", with_company)
    assert evaluate(bundle, tmp_path)[0] == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.latency == {"another": {"images": 1}}
    assert len(manifest.parity) == 1


def test_the_busiest_images_are_looked_into() -> None:
    results = [[], [entry(0, 0.5)], [entry(0, 0.5), entry(30, 0.4)], []]
    truth = Truth(ShapesSource(num_images=4, seed=1), [0, 1, 2, 3])
    scores = Scores(final=metrics(0), results=results, truth=truth)
    assert busiest(scores) == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("setting", "value", "exported"), [("short_side", 64, "96"), ("mean", [0.0, 0.0, 0.0], "123.675")]
)  # fmt: skip
def test_a_manifest_of_other_preprocessing_is_named(
    micro_bundle: Path, tmp_path: Path, setting: str, value: object, exported: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(micro_bundle, bundle)
    edit_manifest(bundle, lambda values: values["preprocess"].update({setting: value}))
    code, report, page = evaluate(bundle, tmp_path)
    assert code == 1
    (failure,) = report["failures"]
    assert failure.startswith(f"preprocess.{setting}: manifest {value}, weights were exported with")
    assert exported in failure
    assert f"preprocess.{setting}" in page


def test_a_sound_bundle_passes_and_the_page_stands_alone(
    micro_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(micro_bundle, bundle)
    code, report, page = evaluate(bundle, tmp_path, "--trace")
    assert (code, report["passed"], report["failures"]) == (0, True, [])
    trace = report["traces"]["onnxruntime"]
    assert trace["first"] is None
    assert trace["differences"][0]["tensor"] == "backbone.conv1 input"
    layers = {entry["layer"] for entry in trace["differences"]}
    assert {"backbone.layer4.1.conv2", "rpn.deltas", "classifier.fc1", "head.refine.0"} <= layers
    assert all(entry["relative"] <= 1e-4 for entry in trace["differences"])
    for values in report["backends"].values():
        assert values["first"]["segm"].keys() == values["segm"].keys()
        assert values["plain"]["bbox"].keys() == values["bbox"].keys()
    assert report["comparisons"]["onnxruntime"]["agreement"] > 0.99
    for outside in ("http:", "https:", 'src="/', "<script", "<link"):
        assert outside not in page
    assert "PASS" in page
    result = run("doctor", bundle)
    assert "parity of onnxruntime on shapes" in result.output
    assert "FAILED" not in result.output


def test_an_engine_that_cannot_run_is_skipped_unless_asked_for(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def default(_: object) -> tuple[list[str], list[str]]:
        return ["torch", "onnxruntime"], ["tensorrt:fp32"]

    monkeypatch.setattr("comask.runtime.parity.open_backends.default_backends", default)
    code, report, page = evaluate(micro_bundle, tmp_path, "--no-record")
    assert code == 0
    assert set(report["backends"]) == {"torch", "onnxruntime"}
    assert report["skipped"]["tensorrt:fp32"]
    assert "tensorrt:fp32" in page
    asked = run("eval", micro_bundle, "--data", "shapes", "--backend", "tensorrt:fp32")
    assert asked.exit_code == 1
    assert asked.output.startswith("error: ")


def test_each_backend_is_opened_once(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_ = [], Predictor.open.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Predictor], bundle: Path, backend: str, how: LoadOptions) -> Predictor:
        opened.append(backend)
        return open_(cls, bundle, backend, how)

    monkeypatch.setattr(Predictor, "open", classmethod(counting))
    evaluate(micro_bundle, tmp_path, "--no-record")
    assert opened == ["torch", "onnxruntime"]


def test_coarse_results_are_first_boxes_with_coarse_masks(micro_bundle: Path) -> None:
    source = ShapesSource(num_images=1, seed=SHAPES_SEED)
    with Predictor.load(micro_bundle, "onnxruntime") as predictor:
        prepared = [predictor.prepare(source.image(0))]
        ((_, outputs),) = predictor.outputs(prepared)
        labels = np.arange(8)
        found = image_results(predictor, source, [0], prepared, labels)
    final, coarse, plain = (found[stage] for stage in ("final", "first", "plain"))
    assert len(coarse[0]) == len(plain[0]) == len(final[0]) == outputs["num_detections"][0] > 0
    height, width = prepared[0].original_size
    for row, box, probs in zip(
        coarse[0], outputs["first_boxes"][0], outputs["coarse_masks"][0], strict=False
    ):
        x, y, w, h = row["bbox"]
        y_scale, x_scale = prepared[0].scale
        corners = box / np.array([x_scale, y_scale, x_scale, y_scale])
        np.testing.assert_allclose([x, y, x + w, y + h], corners, atol=1e-3)
        pasted = paste_masks(probs[None], corners[None].astype(np.float32), (height, width), 0.5)
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]), pasted[0])
