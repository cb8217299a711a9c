"""What the process that builds engines meets, and the profiles that it is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, ConfigError, EngineError
from comask.export import engine_process
from comask.export.build_options import BuildOptions, Profile
from comask.export.engine_process import PlanRequest, _apply_options, build_in_process
from comask.export.trt_functions import with_plugins
from comask.runtime.trt.flavor import load_flavor

try:
    load_flavor("tensorrt-rtx")
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = ("batch=1:1:2", "height=32:96:128", "width=32:128:128")


@pytest.fixture
def bundle(micro_bundle: Path) -> Bundle:
    return Bundle.open(micro_bundle)


def worker_request(bundle: Bundle, folder: Path, model: onnx.ModelProto) -> PlanRequest:
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return PlanRequest(
        flavor="tensorrt-rtx",
        plugin="python",
        graph=str(folder / "graph.onnx"),
        plan=str(folder / "stage2.plan"),
        profiles=(
            Profile.of(bundle.manifest, SMALL).shapes(bundle.manifest.graphs["stage2"]["inputs"]),
        ),
        options=BuildOptions(),
        map_format="HWC",
        timing_cache=None,
        tuned_here=False,
    )


@pytest.fixture
def stage2(bundle: Bundle) -> onnx.ModelProto:
    return with_plugins(onnx.load(bundle.graph("stage2", "fp32")))


def custom_node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def error_of(asked: PlanRequest, folder: Path) -> str:
    with pytest.raises(EngineError) as raised:
        build_in_process(asked, folder, lambda phase, share: None)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_missing_plugin(bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path) -> None:
    custom_node(stage2, "NmsKeep").op_type = "SoftNms"
    text = error_of(worker_request(bundle, tmp_path, stage2), tmp_path)
    assert "cannot parse the graph" in text
    assert "SoftNms" in text
    assert "Plugin not found" in text


def test_an_operator_with_other_strides_than_the_kernels(stage2: onnx.ModelProto) -> None:
    node = custom_node(stage2, "PyramidRoiAlign")
    (strides,) = [a for a in node.attribute if a.name == "strides"]
    strides.ints[:] = [8, 16, 32, 64]
    with pytest.raises(EngineError, match=r"strides is \(8, 16, 32, 64\), the kernel supports"):
        with_plugins(stage2)


def test_an_operator_without_an_attribute(
    bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path
) -> None:
    node = custom_node(stage2, "NmsOverlaps")
    (threshold,) = [a for a in node.attribute if a.name == "iou_threshold"]
    node.attribute.remove(threshold)
    text = error_of(worker_request(bundle, tmp_path, stage2), tmp_path)
    assert "NmsOverlaps: has no attribute iou_threshold" in text


def test_a_graph_that_is_none(bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path) -> None:
    asked = worker_request(bundle, tmp_path, stage2)
    Path(asked.graph).write_bytes(b"not a graph")
    assert "cannot parse the graph" in error_of(asked, tmp_path)


def test_a_profile_that_misses_an_input(
    bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path
) -> None:
    asked = worker_request(bundle, tmp_path, stage2)
    del asked.profiles[0]["proposals"]
    assert "proposals" in error_of(asked, tmp_path)


def test_a_profile_for_one_image_and_one_for_more(
    bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path
) -> None:
    sizes = [text for text in SMALL if not text.startswith("batch")]
    by_batch = Profile.of(bundle.manifest, [*sizes, "batch=1:1:4"]).by_batch()
    inputs = bundle.manifest.graphs["stage2"]["inputs"]
    asked = dataclasses.replace(
        worker_request(bundle, tmp_path, stage2),
        profiles=tuple(profile.shapes(inputs) for profile in by_batch),
    )
    build_in_process(asked, tmp_path, lambda phase, share: None)
    assert Path(asked.plan).stat().st_size > 0
    del asked.profiles[1]["proposals"]
    assert "proposals" in error_of(asked, tmp_path)  # so both profiles reach the builder


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ("1:1:8", [(1, 8, 8), (1, 1, 1)]), ("1:4:8", [(1, 4, 8), (1, 1, 1)]),
        ("1:2:2", [(1, 2, 2), (1, 1, 1)]), ("1", [(1, 1, 1)]), ("2:2:8", [(2, 2, 8)]),
    ],
)  # fmt: skip
def test_profiles_by_batch(
    bundle: Bundle, batch: str, expected: list[tuple[int, int, int]]
) -> None:
    profile = Profile.of(bundle.manifest, [f"batch={batch}"])
    found = profile.by_batch()
    assert [part.batch for part in found] == expected
    assert {dataclasses.replace(part, batch=profile.batch) for part in found} == {profile}


def test_plans_leave_their_memory_to_the_caller() -> None:
    """A TensorRT-RTX that allocates while it runs cannot be captured as a CUDA graph."""
    flavor = load_flavor("tensorrt-rtx")
    config = flavor.trt.Builder(flavor.log).create_builder_config()
    _apply_options(flavor, config, BuildOptions())
    assert config.get_flag(flavor.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(flavor.trt.BuilderFlag.TF32)


def test_maps_of_a_format_that_has_no_fp32(
    bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path
) -> None:
    """HWC8 is for two-byte types: that it is refused shows that the format reaches TensorRT."""
    asked = worker_request(bundle, tmp_path, stage2)
    assert "cannot build it" in error_of(dataclasses.replace(asked, map_format="HWC8"), tmp_path)


def test_a_full_disk(bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path) -> None:
    asked = worker_request(bundle, tmp_path, stage2)
    full = dataclasses.replace(asked, plan="/dev/full")
    assert "No space left on device" in error_of(full, tmp_path)


def test_a_native_abort_is_an_error_message(
    bundle: Bundle, stage2: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wheel's missing link TensorRT-RTX calls std::terminate at the first plugin."""
    from comask.runtime.trt.flavor import wheel_library

    if wheel_library() is None:
        pytest.skip("this wheel of TensorRT-RTX has its link, so nothing aborts")
    monkeypatch.setattr(engine_process, "search_path", lambda folder: None)
    text = error_of(worker_request(bundle, tmp_path, stage2), tmp_path)
    assert "ended by SIGABRT" in text
    assert "terminate called" in text


@pytest.mark.parametrize(
    "text",
    ["batch=2:1:4", "batch=0:1:1", "height=32:100:128", "width=abc", "depth=1", "proposals=1:9:99999",
     "batch=1:2", "batch"],
)  # fmt: skip
def test_impossible_profiles(bundle: Bundle, text: str) -> None:
    with pytest.raises(ConfigError, match="profile"):
        Profile.of(bundle.manifest, [text])


def test_the_default_profile_holds_every_canvas(bundle: Bundle) -> None:
    pre = dataclasses.replace(bundle.manifest.preprocess, short_side=800, max_side=1333)
    profile = Profile.of(dataclasses.replace(bundle.manifest, preprocess=pre))
    assert profile.height == (32, 800, 1344)
    assert profile.width == (32, 1088, 1344)
    inputs = bundle.manifest.graphs["stage2"]["inputs"]
    channels = bundle.manifest.model.channels
    shapes = profile.shapes(inputs)
    assert shapes["p3"] == ((1, channels, 4, 4), (1, channels, 100, 136), (8, channels, 168, 168))
    assert set(shapes) == {entry["name"] for entry in inputs}
