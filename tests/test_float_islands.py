"""Float islands: the smallest modules that keep an fp16 network finite, or a refusal."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import onnx
import pytest
import torch
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from strategies import SIZES, tiny_model
from test_fp16 import compare, pictures
from test_range_scan import scan
from torch import Tensor, nn

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, PrecisionError
from comask.export import pipeline
from comask.export.build_options import BuildOptions, Profile
from comask.export.engine import EngineRequest, build_engines
from comask.export.fp16 import FP16_END, HEADROOM, Extreme, Fp16Report, float_islands
from comask.export.layer_precision import asked_precisions
from comask.export.onnx_export import in_precision
from comask.models.comask import CoMask, folded
from comask.models.precision import FLOAT_OUTPUTS
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.trt.flavor import load_flavor

LOUD = 2.0**24  # a power of 2, so that undoing it is exact


def scaled(model: CoMask, factor: float, *names: str) -> None:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(factor)


def make_loud(model: CoMask) -> CoMask:
    """Computes the same, but inside four modules values lie far beyond f16."""
    block = "backbone.layer2.0."
    with torch.no_grad():
        model.get_parameter(block + "bn2.weight").fill_(0.25)  # else its residual branch is dead
    scaled(model, LOUD, block + "bn1.weight", block + "bn1.bias")
    scaled(model, 1 / LOUD, block + "conv2.weight")
    scaled(model, LOUD, "rpn.conv.weight", "rpn.conv.bias")
    scaled(model, 1 / LOUD, "rpn.objectness.weight", "rpn.deltas.weight")
    scaled(model, LOUD, "classifier.fc1.weight", "classifier.fc1.bias")
    scaled(model, 1 / LOUD, "classifier.fc2.weight")
    scaled(model, LOUD, "head.refine.0.weight")  # GroupNorm undoes it
    return model


# the module that is kept in fp32, and whose output it is kept for
ISLANDS = {
    "backbone.layer2.0": "backbone.layer2.0.conv1",
    "rpn": "rpn.conv",
    "classifier": "classifier.fc1",
    "head.refine": "head.refine.0",
}


# --- the islands --------------------------------------------------------------------------------


def test_a_network_in_range_is_converted_as_ever() -> None:
    model = tiny_model()
    extremes = scan(model)
    assert float_islands(extremes) == {}
    expected, found = folded(model).half(), in_precision(model, "fp16", float_islands(extremes))
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor)
    for module in found.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    report = Fp16Report.of(extremes, {})
    assert report.to_dict()["float_layers"] == []
    assert report.largest.largest == max(e.largest for e in extremes)


def test_islands_are_minimal_and_save_what_would_overflow() -> None:
    model = make_loud(tiny_model())
    extremes = scan(model)
    islands = float_islands(extremes)
    assert {path: e.module for path, e in islands.items()} == ISLANDS
    assert all(e.kind == "output" and e.largest > FP16_END for e in islands.values())
    reference = torch_stages(model)
    for left_out in islands:
        others = islands.keys() - {left_out}
        assert compare(reference, torch_stages(in_precision(model, "fp16", others))).failures
    sound = compare(reference, torch_stages(in_precision(model, "fp16", islands)))
    assert sound.failures == []
    assert sound.detections > 10
    largest = Fp16Report.of(extremes, islands).largest.largest
    quiet = Fp16Report.of(scan(tiny_model()), {}).largest.largest
    assert largest == pytest.approx(quiet, rel=0.5)


def test_without_islands_the_maps_are_not_finite() -> None:
    model = make_loud(tiny_model())
    with torch.inference_mode():
        for islands, finite in ((list[str](), False), (list(ISLANDS), True)):
            half = in_precision(model, "fp16", islands)
            found = half.stage1(torch.from_numpy(pictures()), SIZES)
            assert bool(found["p2"].isfinite().all()) == finite


def test_a_weight_beyond_f16_keeps_its_layer_alone() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.classifier.fc2.weight[0] = 0.0
        model.classifier.fc2.bias[0] = 0.0
        model.classifier.logits.weight[0, 0] = 1e5  # times 0; as f16 infinity it would be NaN
    extremes = scan(model)
    islands = float_islands(extremes)
    assert islands == {"classifier.logits": Extreme("classifier.logits", "weight", 1e5, None)}
    (kept,) = Fp16Report.of(extremes, islands).to_dict()["float_layers"]
    assert kept["reason"] == "the weight of classifier.logits reaches 1.00e+05, fp16 ends at 65504"
    reference = torch_stages(model)
    assert compare(reference, torch_stages(in_precision(model, "fp16"))).failures
    assert not compare(reference, torch_stages(in_precision(model, "fp16", islands))).failures


@pytest.mark.parametrize(
    "path",
    [
        "backbone", "backbone.conv1", "backbone.layer3", "backbone.layer2.0.downsample", "mfpn",
        "mfpn.fpn.output.1", "mfpn.modules_per_level.0.attention.squeeze", "rpn", "rpn.deltas",
        "classifier", "head", "head.refine.1", "head.upsample",
    ],
)  # fmt: skip
def test_an_island_computes_in_f32_what_f16_hands_it(path: str) -> None:
    model = tiny_model()
    half = in_precision(model, "fp16", [path])
    seen = list[tuple[object, object]]()
    half.get_submodule(path).register_forward_hook(
        lambda _, args, output: seen.append((deepcopy(args), deepcopy(output)))
    )
    with torch.inference_mode():
        maps = half.stage1(torch.from_numpy(pictures()), SIZES)
        half.stage2(**maps, image_sizes=SIZES)
        assert maps["p2"].dtype == half.dtype == torch.float16
        assert seen
        for args, output in seen:
            inputs = [tensor for tensor in flat(args) if tensor.is_floating_point()]
            found = list(flat(output))
            assert all(tensor.dtype == torch.float32 for tensor in inputs)
            if path != "mfpn.modules_per_level.0.attention.squeeze":  # which reads a mean, in f32
                assert all(torch.equal(tensor, tensor.half().float()) for tensor in inputs)
            expected = list(flat(folded(model).get_submodule(path)(*deepcopy(args))))
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == (torch.float32 if path in FLOAT_OUTPUTS else torch.float16)
                assert torch.equal(a, b.to(a.dtype))


def flat(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)


@pytest.mark.parametrize(
    ("loud", "undone", "named"),
    [
        (["mfpn.modules_per_level.1.smooth.weight"], [], "p3"),
        (["mfpn.modules_per_level.4.smooth.weight"], ["rpn.conv.weight"], "mfpn"),  # P6
        (
            ["backbone.layer3.1.bn2.weight"],  # C4, which three layers read
            ["mfpn.fpn.lateral.2.weight", "backbone.layer4.0.conv1.weight",
             "backbone.layer4.0.downsample.0.weight"],
            "backbone",
        ),
    ],
)  # fmt: skip
def test_what_passes_between_modules_cannot_be_kept(
    loud: list[str], undone: list[str], named: str
) -> None:
    model = tiny_model()
    nn.init.ones_(model.get_parameter("backbone.layer3.1.bn2.weight"))
    scaled(model, LOUD, *loud)
    scaled(model, 1 / LOUD, *undone)
    with pytest.raises(PrecisionError, match=rf"does not fit fp16: {named} reaches .*use fp32"):
        float_islands(scan(model))


# --- the walk over the tree ---------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> list[Extreme]:
    """Modules of a made-up network, some of them never called (a list of layers), some loud."""
    paths: list[str] = []
    for i in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(["", *paths]))
        paths.append(f"{parent}.m{i}".removeprefix("."))
    found = []
    for path in paths:
        if draw(st.integers(0, 3)):
            for kind in ("output", "input", "weight"):
                largest = draw(st.sampled_from([1.0, 1.0, 1.0, FP16_END / HEADROOM, 3e4, 1e5]))
                found.append(Extreme(path, kind, largest, 0))
    return found


def holds(island: str, module: str) -> bool:
    return module == island or module.startswith(island + ".")


@given(trees())
def test_islands_hold_all_that_is_loud_and_are_the_smallest(extremes: list[Extreme]) -> None:
    loud = [e for e in extremes if e.largest > (1e4 if e.kind != "weight" else FP16_END)]
    loud = [e for e in loud if e.largest != FP16_END / HEADROOM]
    at_border = {e.module for e in loud if e.kind != "weight"}
    sound = {e.module for e in extremes} - at_border

    def around(e: Extreme) -> set[str]:
        return {module for module in sound if holds(module, e.module)}

    if not all(around(e) for e in loud):
        with pytest.raises(PrecisionError):
            float_islands(extremes)
        return
    islands = float_islands(extremes)
    assert islands.keys() <= sound
    for e in loud:
        assert sum(holds(island, e.module) for island in islands) == 1
    for island, reason in islands.items():
        assert reason in loud
        assert holds(island, reason.module)
        assert not any(holds(island, smaller) for smaller in around(reason) - {island})


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """fp16 graphs with islands, and what the command printed."""
    folder = tmp_path_factory.mktemp("islands") / "bundle"
    shutil.copytree(micro_bundle, folder)
    original = pipeline.model_from_bundle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "model_from_bundle", lambda bundle: make_loud(original(bundle)))
        result = run("export", folder, "--precision", "fp16", "--limit", "1")
    assert result.exit_code == 0, result.output
    return Bundle.open(folder), result.output


def test_the_manifest_and_the_command_say_what_stayed_float(exported: tuple[Bundle, str]) -> None:
    bundle, printed = exported
    proof = bundle.manifest.verification["fp16"]
    assert {entry["module"] for entry in proof["float_layers"]} == ISLANDS.keys()
    for entry in proof["float_layers"]:
        assert entry["largest"] > FP16_END
        assert entry["image"] == 0
        largest = f"{entry['largest']:.2e} on image 0"
        reason = f"{ISLANDS[entry['module']]} reaches {largest}, fp16 ends at 65504"
        assert entry["reason"] == reason
        assert f"kept in fp32: {entry['module']}, since {reason}" in printed
    assert proof["range"]["largest"] < FP16_END / HEADROOM
    assert f"the largest value in fp16 is {proof['range']['largest']:.2e}" in printed


def test_graphs_name_their_weights_alike(exported: tuple[Bundle, str], micro_fp16: Path) -> None:
    """Layers of two precisions are paired by these names."""
    bundle, plain, kept = exported[0], Bundle.open(micro_fp16), set[str]()
    for stage in ("stage1", "stage2"):
        graph, before = (onnx.load(b.graph(stage, "fp16")) for b in (bundle, plain))
        types, expected = (
            {
                t.name: t.data_type
                for t in g.graph.initializer
                if t.name.endswith(("weight", "bias"))
            }
            for g in (graph, before)
        )
        assert types.keys() == expected.keys()
        for name, kind in types.items():
            inside = next((i for i in ISLANDS if name.startswith(f"model.{i}.")), None)
            kept |= {inside} if inside else set()
            own = name == "model.head.offset_bias"
            assert kind == (TensorProto.FLOAT if inside or own else TensorProto.FLOAT16), name
        assert set(asked_precisions(graph).values()) == {"fp32", "fp16"}
        assert [(v.name, v.type) for v in graph.graph.output] == [
            (v.name, v.type) for v in before.graph.output
        ]
    assert kept == ISLANDS.keys()


def test_tensorrt_builds_islands(exported: tuple[Bundle, str]) -> None:
    try:
        load_flavor("tensorrt-rtx")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    bundle = exported[0]
    request = EngineRequest(
        flavor="tensorrt-rtx",
        precision="fp16",
        plugin="none",
        profile=Profile.of(
            bundle.manifest, ("batch=1:1:2", "height=32:96:128", "width=32:128:128")
        ),
        options=BuildOptions(compute_capabilities=(89,)),
    )
    layers = build_engines(bundle, request).info.layers
    for stage in ("stage1", "stage2"):
        asked = Counter(asked_precisions(onnx.load(bundle.graph(stage, "fp16"))).values())
        found = layers[stage].network  # as far as TensorRT kept their names
        assert found.keys() == asked.keys() == {"fp16", "fp32"}
        assert all(found[kind] <= count for kind, count in asked.items())


def test_a_network_that_does_not_fit_leaves_the_bundle_alone(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(micro_bundle, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = pipeline.model_from_bundle

    def loud(bundle: Bundle) -> CoMask:
        model = original(bundle)
        scaled(model, 1e6, "mfpn.modules_per_level.1.smooth.weight")
        return model

    monkeypatch.setattr(pipeline, "model_from_bundle", loud)
    result = run("export", folder, "--precision", "fp16", "--limit", "1")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error: this network does not fit fp16: p3 ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
