"""Half precision: what stays f32, what the fp16 graphs hold, and that their judge is not blind."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import compared
import numpy as np
import onnx
import pytest
import torch
from conftest import run
from onnx import TensorProto, numpy_helper
from strategies import SIZES, tiny_model
from test_compare import Fixed

from comask.bundle import Bundle, sha256
from comask.data.shapes import ShapesSource
from comask.errors import BackendUnavailableError
from comask.export import pipeline
from comask.export.build_options import BuildOptions, Profile
from comask.export.engine import EngineRequest, build_engines
from comask.export.onnx_export import in_precision
from comask.models.backbone import ResNet
from comask.models.comask import CoMask
from comask.models.neck import ChannelAttention
from comask.models.precision import GroupNorm
from comask.runtime.backends import open_stages
from comask.runtime.backends.base import Stages
from comask.runtime.backends.ort import OrtSession
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.compare import Comparison
from comask.runtime.tolerances import TOLERANCES
from comask.runtime.trt.flavor import load_flavor


def pictures() -> np.ndarray:
    """u8 [2, 96, 128, 3]."""
    source = ShapesSource(num_images=2, seed=9)
    tiled = [np.tile(source.image(i), (2, 2, 1)) for i in range(2)]
    return np.stack([image[:96, :128] for image in tiled])


def compare(reference: Stages, other: Stages, batch: int = 2) -> Comparison:
    images, sizes = pictures()[:batch], SIZES.numpy()[:batch]
    return compared.compare(reference, other, images, sizes, TOLERANCES["fp16"])


def test_constants_stay_f32_and_the_original_as_it_was() -> None:
    model = tiny_model()
    before = deepcopy(model.state_dict())
    half = in_precision(model, "fp16")
    own = {"mean": half.mean, "std": half.std, "anchors": half.rpn.base_anchors,
           "offset_bias": half.head.offset_bias}  # fmt: skip
    assert {name: tensor.dtype for name, tensor in own.items()} == dict.fromkeys(own, torch.float32)
    others = {n: p.dtype for n, p in half.named_parameters() if not n.endswith("offset_bias")}
    assert set(others.values()) == {torch.float16}
    assert half.dtype == torch.float16
    assert in_precision(model, "fp32").dtype == torch.float32
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_folded_batch_norms_compute_the_same() -> None:
    torch.manual_seed(0)
    net = ResNet("resnet50", norm="frozen").eval()
    for norm in [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight, 0.5, 0.1)
        torch.nn.init.normal_(norm.bias, std=0.1)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        net.fold()
        found = net(images)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_variances_that_f16_cannot_hold() -> None:
    net = ResNet("resnet18", norm="frozen").eval()
    net.bn1.running_var[:2] = torch.tensor([1e-9, 1e7])
    with torch.no_grad():
        net.conv1.weight[0] *= 1e-3
        net.conv1.weight[1] *= 1e3
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected, *_) = net(images)
        net.fold()
        (found, *_) = net.half()(images.half())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-3 * float(expected.max()))


def test_sums_over_large_maps_do_not_overflow() -> None:
    norm = GroupNorm(2, 8)
    x = 40 + 20 * torch.randn(1, 8, 100, 168)  # a group's squares sum up to 1e8
    with torch.no_grad():
        expected, found = norm(x), deepcopy(norm).half()(x.half())
        attention = ChannelAttention(8, 2)
        weights = attention(x) / x
        half_weights = deepcopy(attention).half()(x.half()).float() / x
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(half_weights, weights, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def bundle(micro_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy, since engines are built in it."""
    folder = tmp_path_factory.mktemp("fp16") / "bundle"
    return Bundle.open(Path(shutil.copytree(micro_fp16, folder)))


def test_a_precision_is_added_in_place(bundle: Bundle, micro_bundle: Path) -> None:
    manifest, before = bundle.manifest, Bundle.open(micro_bundle).manifest
    assert manifest.precisions == ("fp32", "fp16")
    assert set(manifest.files) - set(before.files) == {
        "stage1_proposals.fp16.onnx", "stage2_roi_head.fp16.onnx",
    }  # fmt: skip
    assert {p.name for p in bundle.folder.iterdir()} == {*manifest.files, "manifest.json"}
    for name, digest in manifest.files.items():
        assert sha256(bundle.folder / name) == digest == before.files.get(name, digest)
    assert manifest.verification["fp32"] == before.verification["fp32"]
    for proof in (manifest.verification["fp16"], manifest.verification["fp16"]["rounded"]):
        assert proof["detections"] > 0
        assert 1e-5 < max(proof["relative"].values()) < 1e-2
    text = (bundle.folder / "manifest.json").read_text()
    again = run("export", bundle.folder, "--precision", "fp16")
    assert again.exit_code == 0
    assert "holds fp16 graphs already" in again.output
    assert (bundle.folder / "manifest.json").read_text() == text


def test_graphs_keep_the_contract(bundle: Bundle) -> None:
    """Maps are f16; pixels, scores and probabilities are not. Diagnostics stay those of fp32."""
    types = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    for stage in ("stage1", "stage2"):
        graph = onnx.load(bundle.graph(stage, "fp16")).graph
        for side, values in (("inputs", graph.input), ("outputs", graph.output)):
            for spec, value in zip(bundle.manifest.graphs[stage][side], values, strict=True):
                assert value.name == spec["name"]
                is_map = value.name in ("p2", "p3", "p4", "p5")
                expected = TensorProto.FLOAT16 if is_map else types[spec["dtype"]]
                assert value.type.tensor_type.elem_type == expected, value.name
        weights = [t for t in graph.initializer if len(t.dims) >= 2]
        large = [t for t in weights if np.prod(t.dims) > 1000]
        assert large
        assert {t.data_type for t in large} == {TensorProto.FLOAT16}
    sizes = [(bundle.folder / f"stage1_proposals{p}.onnx").stat().st_size for p in ("", ".fp16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_predictor_runs_them(bundle: Bundle) -> None:
    with open_stages(bundle, "torch") as reference, open_stages(bundle, "onnxruntime:fp16") as half:
        result = compare(reference, half)
    assert result.failures == []
    assert result.detections > 0


CHANGED = (
    "backbone.conv1.weight", "backbone.layer2.0.downsample.0.weight", "mfpn.fpn.lateral.0.weight",
    "mfpn.fpn.output.3.weight", "mfpn.modules_per_level.2.reduce.weight",
    "mfpn.modules_per_level.1.branches.0.0.1.weight", "mfpn.modules_per_level.3.smooth.weight",
    "mfpn.modules_per_level.0.attention.excite.weight", "rpn.conv.weight", "rpn.objectness.weight",
    "rpn.deltas.weight", "classifier.fc1.weight", "classifier.logits.weight",
    "head.offsets.weight", "head.offset_bias", "head.mask.weight",
)  # fmt: skip


def changed(name: str, factor: float) -> CoMask:
    model = tiny_model()
    with torch.no_grad():
        {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].mul_(factor)
    return in_precision(model, "fp16")


def test_half_precision_passes_and_no_wrong_weight_does() -> None:
    reference = torch_stages(tiny_model())
    sound = compare(reference, torch_stages(in_precision(tiny_model(), "fp16")))
    assert sound.failures == []
    assert sound.detections > 10
    for name in CHANGED:
        assert compare(reference, torch_stages(changed(name, 1.5))).failures, name
    for name in ("mean", "std"):
        assert compare(reference, torch_stages(changed(name, 1.1))).failures, name


def test_a_large_box_may_lie_farther_off_than_a_small_one() -> None:
    side = np.array([10.0, 500.0], np.float32)[:, None]
    boxes = side * np.array([0, 0, 1, 1], np.float32) + np.array([[0], [100]], np.float32)
    scores = np.full((1, 2), 0.9, np.float32)
    stage1 = {f"p{k}": np.ones((1, 1, 2, 2), np.float32) for k in (2, 3, 4, 5)}

    def stages(moved: float) -> Stages:
        found = {"proposals": boxes[None] + np.float32(moved), "proposal_scores": scores}
        none = {"boxes": boxes[None, :0], "scores": scores[:, :0], "masks": scores[:, :0],
                "labels": scores[:, :0], "num_detections": np.zeros(1, np.int32)}  # fmt: skip
        return Stages("fixed", Fixed(stage1 | found), Fixed(none))

    for moved, lone in ((0.06, 0), (0.1, 2), (0.9, 2), (1.2, 4)):
        assert compare(stages(0), stages(moved), batch=1).contested_proposals == lone


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_graph_with_a_wrong_weight_fails(bundle: Bundle, tmp_path: Path, stage: str) -> None:
    model = onnx.load(bundle.graph(stage, "fp16"))
    name = "model.backbone.conv1.weight" if stage == "stage1" else "model.head.offset_bias"
    (weight,) = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(weight)
    scaled = (1.5 * values).astype(values.dtype)
    weight.CopyFrom(numpy_helper.from_array(scaled, name))
    onnx.save(model, tmp_path / "changed.onnx")
    sessions = {s: OrtSession(bundle.graph(s, "fp16")) for s in ("stage1", "stage2")}
    sessions[stage] = OrtSession(tmp_path / "changed.onnx")
    assert compare(open_stages(bundle, "torch"), Stages("changed", **sessions)).failures


def test_an_overflow_in_f16_is_found(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the range scan has missed it; ONNX Runtime's CPU computes in fp32 and would not see it.

    Nothing is left behind.
    """
    folder = tmp_path / "bundle"
    shutil.copytree(micro_bundle, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = pipeline.model_from_bundle

    def loud(bundle: Bundle) -> CoMask:
        model = original(bundle)
        with torch.no_grad():  # a hidden layer of the classifier beyond 65504, undone behind it
            model.classifier.fc1.weight *= 1e5
            model.classifier.fc1.bias *= 1e5
            model.classifier.fc2.weight *= 1e-3
            model.classifier.logits.weight *= 1e-2
        return model

    monkeypatch.setattr(pipeline, "model_from_bundle", loud)
    monkeypatch.setattr(pipeline, "float_islands", lambda extremes: {})
    result = run("export", folder, "--precision", "fp16", "--limit", "1")
    assert result.exit_code == 1
    assert "torch:fp16 does not compute what PyTorch does" in result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tensorrt_builds_the_graphs(bundle: Bundle) -> None:
    """Strongly typed: no operator may get f16 and f32 together. On Turing GEMMs must be f16, too."""
    try:
        load_flavor("tensorrt-rtx")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    request = EngineRequest(
        flavor="tensorrt-rtx",
        precision="fp16",
        plugin="none",
        profile=Profile.of(
            bundle.manifest, ("batch=1:1:2", "height=32:96:128", "width=32:128:128")
        ),
        options=BuildOptions(compute_capabilities=(75, 89)),
    )
    engines = build_engines(bundle, request)
    for stage in ("stage1", "stage2"):
        assert engines.plan(stage).stat().st_size > 100_000


def test_wrong_usage(bundle: Bundle, micro_run: Path, tmp_path: Path) -> None:
    checkpoint = micro_run / "checkpoint-last.pt"
    for arguments, words in [
        (
            (checkpoint, "--output", tmp_path / "b", "--precision", "fp32,int4"),
            "not one of fp32, fp16",
        ),
        ((bundle.folder, "--output", tmp_path / "b"), "--output"),
        ((bundle.folder, "--score-threshold", "0.1"), "--score-threshold"),
        ((bundle.folder, "--diagnostics"), "--diagnostics"),
        ((checkpoint, "--precision", "fp16"), "--output"),
    ]:
        result = run("export", *arguments)
        assert result.exit_code == 2, result.output
        assert words in result.output
    result = run("export", tmp_path, "--precision", "fp16")
    assert result.exit_code == 1
    assert "neither a checkpoint nor a bundle (no manifest.json)" in result.output
    assert not list(tmp_path.iterdir())
    old = json.loads((bundle.folder / "manifest.json").read_text()) | {"schema_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert "has manifest schema 1" in run("export", tmp_path, "--precision", "fp16").output
