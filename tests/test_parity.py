"""`comask-eval`: broken graphs and pipelines fail, and the report names what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from comask.cli.evaluate import SHAPES_SEED
from comask.runtime import Predictor
from comask.runtime.parity.agreement import agreement, pairs
from comask.runtime.parity.normalisation import explain_input
from comask.runtime.parity.scores import image_results
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from pycocotools import mask as coco_mask

from comask.bundle import sha256
from comask.config import PreprocessConfig
from comask.data.shapes import ShapesSource
from comask.masks import paste_masks

IMAGES = 3


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


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def scale(tensor: str, factor: float = 1.5) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (found,) = (entry for entry in model.graph.initializer if entry.name == tensor)
        value = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array(value * value.dtype.type(factor), tensor))

    return change


def reverse_channels(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "images":
                node.input[place] = "images.bgr"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "reversed"))
    gather = helper.make_node("Gather", ["images", "reversed"], ["images.bgr"], axis=3)
    model.graph.node.insert(0, gather)


def evaluate(bundle: Path, tmp_path: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and page of a small evaluation."""
    page, report = tmp_path / "report.html", tmp_path / "report.json"
    result = run(
        "eval", bundle, "--data", "shapes", "--images", IMAGES, "--json", report, "--report", page,
        *options,
    )  # fmt: skip
    assert report.exists(), result.output
    return result.exit_code, json.loads(report.read_text()), page.read_text()


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
    def change(model: onnx.ModelProto) -> None:
        """Takes the ReLU between two layers of the classifier away."""
        (fc1,) = (n for n in model.graph.node if n.input[1:2] == ["model.classifier.fc1.weight"])
        (relu,) = (n for n in model.graph.node if fc1.output[0] in n.input)
        relu.op_type = "Identity"

    bundle = broken(micro_bundle, tmp_path / "bundle", "stage2_roi_head.onnx", change)
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
    assert {"backbone.layer4.1.conv2", "rpn.deltas", "classifier.fc1", "head.mask"} <= layers
    assert all(entry["relative"] <= 1e-4 for entry in trace["differences"])
    for values in report["backends"].values():
        assert values["coarse"]["segm"].keys() == values["segm"].keys()
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
        return ["onnxruntime"], ["tensorrt:fp32"]

    monkeypatch.setattr("comask.runtime.parity.contestants.default_backends", default)
    code, report, page = evaluate(micro_bundle, tmp_path, "--no-record")
    assert code == 0
    assert set(report["backends"]) == {"onnxruntime"}
    assert report["skipped"]["tensorrt:fp32"]
    assert "tensorrt:fp32" in page
    asked = run("eval", micro_bundle, "--data", "shapes", "--backend", "tensorrt:fp32")
    assert asked.exit_code == 1
    assert asked.output.startswith("error: ")


def test_each_backend_is_opened_once(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, load = [], Predictor.load.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Predictor], bundle: Path, backend: str, **how: Any) -> Predictor:
        opened.append(backend)
        return load(cls, bundle, backend, **how)

    monkeypatch.setattr(Predictor, "load", classmethod(counting))
    evaluate(micro_bundle, tmp_path, "--no-record")
    assert opened == ["torch", "onnxruntime"]


def test_coarse_results_are_first_boxes_with_coarse_masks(micro_bundle: Path) -> None:
    source = ShapesSource(num_images=1, seed=SHAPES_SEED)
    with Predictor.load(micro_bundle, "onnxruntime") as predictor:
        prepared = [predictor.prepare(source.image(0))]
        ((_, outputs),) = predictor.outputs(prepared)
        labels = np.arange(8)
        fine, coarse = image_results(predictor, source, [0], prepared, labels)
    assert len(coarse[0]) == len(fine[0]) == outputs["num_detections"][0] > 0
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


def own_results(
    bundle: Path,
    path: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    shift: int = 0,
) -> Path:
    """COCO results of a pipeline that changes images before and category ids after."""
    source = ShapesSource(num_images=IMAGES, seed=SHAPES_SEED)
    rows = []
    with Predictor.load(bundle, "onnxruntime") as predictor:
        for i in range(IMAGES):
            found = predictor(np.ascontiguousarray(change(source.image(i))))
            rows += [
                row | {"category_id": row["category_id"] + shift}
                for row in found.to_coco(source.info(i).id)
            ]
    known = {category.id for category in source.categories}
    path.write_text(json.dumps([row for row in rows if row["category_id"] in known]))
    return path


@pytest.mark.parametrize(
    ("change", "shift", "mistake"),
    [
        (lambda image: image, 0, None),
        (lambda image: image[..., ::-1], 0, "channels reversed"),
        (lambda image: image // 255, 0, "pixels scaled to 0..1"),
        (lambda image: image, -1, "category ids one too low"),
    ],
)
def test_a_pipeline_of_ones_own_is_compared_and_its_mistake_named(
    micro_bundle: Path, tmp_path: Path, change: Any, shift: int, mistake: str | None
) -> None:
    file = own_results(micro_bundle, tmp_path / "own.json", change, shift)
    code, report, page = evaluate(
        micro_bundle, tmp_path, "--backend", "torch", "--results", file, "--no-record"
    )
    found = report["comparisons"]["own.json"]
    assert code == (1 if mistake else 0)
    assert found["passed"] is (mistake is None)
    if mistake:
        assert mistake in found["failures"][0]
        assert mistake in page
        assert 'src="data:image/jpeg;base64,' in page  # the worst disagreements


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "expected a list"),
        ('[{"image_id": 1}]', "entry 0 needs bbox"),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [], "score": 1, "segmentation": []}]',
            "no compr",
        ),
    ],
)
def test_results_that_cannot_be_used_are_refused(
    micro_bundle: Path, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "own.json").write_text(content)
    result = run("eval", micro_bundle, "--data", "shapes", "--images", "1", "--backend", "torch",
                 "--no-record", "--results", tmp_path / "own.json")  # fmt: skip
    assert result.exit_code == 1
    assert words in result.output


def normalised(image: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    return ((image - np.array(mean)) / np.array(std)).transpose(2, 0, 1).astype(np.float32)


def test_each_usual_mistake_of_normalisation_is_told() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3)).astype(np.uint8)
    config = PreprocessConfig()
    mean, std = config.mean, config.std
    pixels = image.astype(np.float64)
    for found, words in (
        (normalised(pixels[..., ::-1], mean, std), "BGR"),
        (normalised(pixels, 0, 1), "not normalised (pixels of 0..255)"),
        (normalised(pixels / 255, 0, 1), "not normalised (pixels of 0..1)"),
        (normalised(pixels / 255, mean, std), "scaled to 0..1 before"),
        (normalised(pixels, 127.5, 127.5), "scaled to -1..1"),
        (normalised(pixels, mean[::-1], std[::-1]), "reversed order"),
        (normalised(pixels, mean, 1), "not divided"),
        (normalised(pixels, 0, std), "mean taken off"),
        (normalised(pixels, (100, 110, 120), std), "mean (100, 110, 120)"),
        (normalised(pixels[..., [1, 2, 0]], mean, std), "from GBR"),
        (normalised(np.roll(pixels, 3, axis=1), mean, std), "resized, cropped or moved"),
        (normalised(pixels, mean, std), "not zero outside"),
    ):
        assert words in explain_input(image, (32, 64), found, config, 1e-3)


def entry(x: int, score: float, label: int = 1) -> dict[str, Any]:
    bitmap = np.zeros((40, 200), np.uint8, order="F")
    bitmap[5:25, x : x + 20] = 1
    rle = coco_mask.encode(bitmap)
    rle["counts"] = rle["counts"].decode()
    return {"bbox": [x, 5, 20, 20], "score": score, "category_id": label, "segmentation": rle}


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.integers(0, 5))
def test_agreement_is_a_share(scores: list[float], lost: int) -> None:
    """Of detections apart from each other it is what formula and counting say."""
    whole = [entry(30 * i, score) for i, score in enumerate(scores)]
    part = [row for i, row in enumerate(whole) if i != lost]
    assert agreement(whole, whole) == pytest.approx(1)
    assert agreement(whole, []) == 0
    kept = sum(row["score"] for row in part)
    assert agreement(whole, part) == pytest.approx(2 * kept / (sum(scores) + kept))
    assert agreement(part, whole) == pytest.approx(agreement(whole, part))


def test_only_one_class_overlapping_by_half_is_the_same() -> None:
    assert agreement([], []) == 1
    assert pairs([entry(0, 0.9)], [entry(0, 0.9, label=2), entry(15, 0.9)]) == []
    ((_, _, overlap),) = pairs([entry(0, 0.9)], [entry(5, 0.9)])
    assert overlap == pytest.approx(15 / 25)
    # each is shared once
    assert len(pairs([entry(0, 0.9), entry(1, 0.8)], [entry(0, 0.9)])) == 1
