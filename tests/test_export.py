"""The exported graphs against PyTorch: sizes, batches, proposals; and what export refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from compared import compare
from conftest import MICRO, run, settings

from comask.bundle import Bundle
from comask.data.shapes import ShapesSource
from comask.runtime import Predictor
from comask.runtime.backends import open_stages
from comask.runtime.backends.base import Stages
from comask.runtime.tolerances import Tolerance
from comask.structures import Detections


@pytest.fixture(scope="module")
def bundle(micro_bundle: Path) -> Bundle:
    return Bundle.open(micro_bundle)


@pytest.fixture(scope="module")
def torch_backend(bundle: Bundle) -> Stages:
    return open_stages(bundle, "torch")


@pytest.fixture(scope="module")
def ort_backend(bundle: Bundle) -> Stages:
    return open_stages(bundle, "onnxruntime")


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    """A real shapes image, tiled to any size."""
    image = ShapesSource(num_images=seed + 1, seed=9).image(seed)
    tiles = (-(-h // image.shape[0]), -(-w // image.shape[1]), 1)
    return np.tile(image, tiles)[:h, :w].copy()


@pytest.mark.parametrize(
    ("height", "width", "batch"),
    [(96, 96, 1), (32, 32, 1), (96, 320, 2), (320, 96, 3), (32, 640, 1), (256, 224, 2),
     (800, 1344, 1), (1344, 800, 1)],
)  # fmt: skip
def test_every_size_agrees(
    torch_backend: Stages, ort_backend: Stages, height: int, width: int, batch: int
) -> None:
    images = np.stack([picture(height, width, i) for i in range(batch)])
    sizes = np.array([[height - 11 * i, width - 5 * i] for i in range(batch)], np.int32)
    result = compare(torch_backend, ort_backend, images, sizes, Tolerance())
    assert result.failures == []
    assert result.detections > 0
    assert result.proposals > 0


def assert_same(a: Detections, b: Detections) -> None:
    """The contract of batches: same labels and count, boxes to 0.01 px, scores to 1e-4."""
    assert len(a) == len(b) > 0
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.boxes_xyxy, b.boxes_xyxy, atol=0.01)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    np.testing.assert_allclose(a.mask_probs, b.mask_probs, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_batch_equals_its_images_alone(micro_bundle: Path, backend: str) -> None:
    images = [picture(96, 128, i) for i in range(4)] + [picture(128, 96, 4), picture(40, 300, 5)]
    with Predictor.load(micro_bundle, backend) as predictor:
        together = predictor(images)
        for image, found in zip(images, together, strict=True):
            assert_same(predictor(image), found)
            assert found.image_size == image.shape[:2]


@pytest.mark.parametrize("count", [1, 50])
def test_fewer_proposals_may_be_passed(
    torch_backend: Stages, ort_backend: Stages, count: int
) -> None:
    sizes = np.array([[96, 128]], np.int32)
    feeds = torch_backend.stage1.run({"images": picture(96, 128)[None], "image_sizes": sizes})
    feeds |= {"image_sizes": sizes}
    for name in ("proposals", "proposal_scores"):
        feeds[name] = np.ascontiguousarray(feeds[name][:, :count])
    a, b = (stages.stage2.run(feeds) for stages in (torch_backend, ort_backend))
    assert a["num_detections"] == b["num_detections"] > 0
    np.testing.assert_allclose(a["boxes"], b["boxes"], atol=0.05)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_ties_alike(
    torch_backend: Stages, ort_backend: Stages, value: int
) -> None:
    feeds = {
        "images": np.full((1, 96, 128, 3), value, np.uint8),
        "image_sizes": np.array([[96, 128]], np.int32),
    }
    a, b = (stages.stage1.run(feeds) for stages in (torch_backend, ort_backend))
    np.testing.assert_allclose(a["proposal_scores"], b["proposal_scores"], atol=1e-5)


def test_graph_files_follow_the_contract(bundle: Bundle) -> None:
    manifest = bundle.manifest
    of_stage2 = ["CutRows", "PadRows", "PyramidRoiAlign", "SortedNms"]
    for stage, ops in (("stage1", ["SortedNms"]), ("stage2", of_stage2)):
        model = onnx.load(bundle.graph(stage, "fp32"))
        nodes = [node for node in model.graph.node if node.domain == "comask"]
        assert sorted({node.op_type for node in nodes}) == ops
        assert sorted(function.name for function in model.functions) == ops
        for node in nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            has_kernel = node.op_type in ("PyramidRoiAlign", "SortedNms")
            assert attributes.get("plugin_namespace") == (b"comask" if has_kernel else None)
        assert {o.domain: o.version for o in model.opset_import}[""] >= 20
        specs = manifest.graphs[stage]
        assert [i.name for i in model.graph.input] == [spec["name"] for spec in specs["inputs"]]
        assert [o.name for o in model.graph.output] == [spec["name"] for spec in specs["outputs"]]
    names = [spec["name"] for spec in manifest.graphs["stage2"]["outputs"]]
    assert names[:5] == ["num_detections", "boxes", "scores", "labels", "masks"]
    assert names[5:] == ["first_boxes", "coarse_masks", "cell_weights", "plain_boxes"]
    pooled = [n for n in onnx.load(bundle.graph("stage2", "fp32")).graph.node
              if n.op_type == "PyramidRoiAlign"]  # fmt: skip
    assert len(pooled) == 3  # classification, coarse pass, fine pass


def test_manifest_says_how_it_was_proved(bundle: Bundle) -> None:
    proof = bundle.manifest.verification["fp32"]
    assert proof["detections"] > 0
    assert max(proof["relative"].values()) < 1e-3
    assert set(bundle.manifest.files) == {
        "weights.safetensors", "stage1_proposals.onnx", "stage2_roi_head.onnx",
    }  # fmt: skip
    assert bundle.manifest.latency is None
    assert [c.name for c in bundle.manifest.categories][:2] == ["circle", "square"]


def test_a_graph_that_differs_is_not_released(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from comask.export import pipeline

    original = pipeline.export_stage2

    def tampered(model: torch.nn.Module, path: Path, *, diagnostics: bool) -> None:
        with torch.no_grad():
            model.head.offset_bias += 0.05
        original(model, path, diagnostics=diagnostics)
        with torch.no_grad():
            model.head.offset_bias -= 0.05

    monkeypatch.setattr(pipeline, "export_stage2", tampered)
    output = tmp_path / "bundle"
    result = run(
        "export", micro_run / "checkpoint-last.pt", "--output", output, "--score-threshold", "0",
        "--limit", "1",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "onnxruntime:fp32 does not compute what PyTorch does" in result.output
    assert not list(tmp_path.iterdir())


def test_export_refuses_in_one_line(tmp_path: Path, micro_run: Path, micro_bundle: Path) -> None:
    checkpoint = micro_run / "checkpoint-last.pt"
    (tmp_path / "no.pt").write_text("no")
    for arguments, words in [
        ((tmp_path / "missing.pt", "--output", tmp_path / "b"), "no such checkpoint"),
        ((tmp_path / "no.pt", "--output", tmp_path / "b"), "not a readable checkpoint"),
        ((checkpoint, "--output", micro_bundle), "is there already"),
        ((checkpoint, "--output", tmp_path / "b", "--data", tmp_path), "no data set found"),
    ]:
        result = run("export", *arguments)
        assert result.exit_code == 1, result.output
        assert words in result.output
        assert result.output.count("error:") == 1
    assert run("export", checkpoint).exit_code == 2


def test_json_report(micro_bundle: Path) -> None:
    json.loads((micro_bundle / "manifest.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            ("model.collaboration=fc_reg", "model.msfem_place=replace"), marks=pytest.mark.slow
        ),
        (
            "model.refined_nms_iou=0.5", "model.separate_fine_head=true",
            "model.train_refined_masks=true", "model.backbone_norm=group",
            "model.residual_attention=true", "model.mask_kernel=1", "model.offset_activation=exp",
            "model.cell_pooling=logit", "model.empty_foreground=proposal",
            "model.mask_threshold=0.4",
        ),
        pytest.param(
            ("model.cell_pooling=bilinear", "model.offset_activation=none", "model.msfem_mode=tied"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fc_reg", "many", "others"],
)  # fmt: skip
def test_every_option_exports(tmp_path: Path, changes: tuple[str, ...]) -> None:
    """`comask export` compares with PyTorch before it writes anything."""
    assert run(
        "train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
        *settings(*MICRO, "train.max_steps=0", "train.evaluate_every=0", *changes),
    ).exit_code == 0  # fmt: skip
    result = run(
        "export", tmp_path / "run" / "checkpoint-best.pt", "--output", tmp_path / "bundle",
        "--score-threshold", "0", "--limit", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["mask_threshold"] == manifest["model"]["mask_threshold"]
    assert list(manifest["verification"]) == ["fp32"]
