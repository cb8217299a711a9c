"""`comask serve`: what it writes, and what it refuses to."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from triton_server import find_server

from comask.bundle import STAGES, WEIGHTS, Bundle, graph_file, sha256
from comask.errors import ComaskError, ConfigError, EngineError
from comask.export.build_options import Profile
from comask.export.triton.model_config import Name, to_pbtxt
from comask.export.triton.repository import ServeRequest, write_repository
from comask.runtime.backends.ort import OrtSession
from comask.runtime.trt.engine_folder import DESCRIPTION, ENGINES, PLANS, EngineInfo

NUMPY_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int32": "TYPE_INT32",
}  # fmt: skip


def parsed(repository: Path) -> dict[str, Any]:
    """The configurations, read by Triton's own protobuf, by model."""
    messages = find_server().packages / "tritonclient" / "grpc" / "model_config_pb2.py"
    # its package would import gRPC
    spec = importlib.util.spec_from_file_location("model_config_pb2", messages)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from google.protobuf import text_format

    return {
        file.parent.name: text_format.Parse(file.read_text(), module.ModelConfig())
        for file in repository.glob("*/config.pbtxt")
    }


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def write_fake_engines(folder: Path, **changes: Any) -> Path:
    """Engines in a bundle, with other bytes for plans: nothing here runs them."""
    bundle = Bundle.open(folder)
    profile = Profile.of(bundle.manifest, ["batch=1:2:4"])
    info = EngineInfo(
        flavor="tensorrt", version="10.16.1", target="sm90", gpu="NVIDIA H200", driver=13000,
        precision="fp32", plugin="aot", plugin_sha256="", profile=profile.ranges(), options={},
        graphs={s: bundle.manifest.files[graph_file(s, "fp32")] for s in STAGES}, transformed={},
        plans={}, layers={}, seconds={}, verification={}, created="", comask_version="",
    )  # fmt: skip
    info = dataclasses.replace(info, **changes)
    place = folder / ENGINES / info.folder_name
    place.mkdir(parents=True)
    for name in PLANS.values():
        (place / name).write_text(f"{info.folder_name} {name}")
    info = dataclasses.replace(info, plans={s: sha256(place / n) for s, n in PLANS.items()})
    (place / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(info)))
    return place


@pytest.fixture
def bundle(micro_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))


def test_the_configurations_are_those_of_the_graphs(micro_fp16: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    result = run(
        "serve", micro_fp16, "--backend", "onnxruntime:fp16",
        "--output", repository, "--model-name", "shapes", "--batch", 3, "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    manifest = Bundle.open(micro_fp16).manifest
    assert told["weights_sha256"] == manifest.files[WEIGHTS]
    configs = parsed(repository)
    assert set(configs) == {"shapes", "shapes_stage1", "shapes_stage2"}
    for stage in STAGES:
        config, graph = configs[f"shapes_{stage}"], repository / f"shapes_{stage}" / "1/model.onnx"
        assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 3)
        assert parameters(config)["sha256"] == manifest.files[graph_file(stage, "fp16")]
        assert sha256(graph) == parameters(config)["sha256"]
        session = OrtSession(graph, "cpu")
        for specs, tensors in ((session.inputs, config.input), (session.outputs, config.output)):
            assert [spec.name for spec in specs] == [tensor.name for tensor in tensors]
            for spec, tensor in zip(specs, tensors, strict=True):
                kind = type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type
                assert kind.values_by_number[tensor.data_type].name == NUMPY_TYPES[spec.dtype.name]
                sizes = [-1 if isinstance(n, str) else n for n in spec.shape[1:]]
                reshaped = list(tensor.reshape.shape) if tensor.HasField("reshape") else tensor.dims
                assert sizes == list(reshaped)
    client = configs["shapes"]
    assert (client.backend, client.max_batch_size) == ("python", 3)
    assert list(client.dynamic_batching.preferred_batch_size) == [3]
    assert parameters(client)["weights_sha256"] == manifest.files[WEIGHTS]
    assert all(tensor.optional for tensor in client.input)


def test_plans_go_with_what_they_need(bundle: Path, tmp_path: Path) -> None:
    write_fake_engines(bundle, map_format="HWC")
    write_fake_engines(bundle, plugin="python")  # which is passed over
    output = tmp_path / "repository"
    result = run("serve", bundle, "--backend", "tensorrt", "--output", output)
    assert result.exit_code == 0, result.output
    assert "up to 4 images at once; needs comask in the server's Python, " in result.output
    assert "TensorRT 10.16.1, NVIDIA H200" in result.output
    plan = output / "comask_stage2" / "1" / "model.plan"
    assert plan.read_text().endswith("fp32-aot stage2.plan")
    configs = parsed(output)
    stage = configs["comask_stage2"]
    assert (stage.platform, stage.max_batch_size) == ("tensorrt_plan", 4)
    needs = {"tensorrt_version": "10.16.1", "target": "sm90", "gpu": "NVIDIA H200"}
    assert parameters(stage) == needs | {"sha256": sha256(plan)}
    # Triton must not take their size in memory for the product of their dimensions
    padded = {tensor.name for tensor in stage.input if tensor.is_non_linear_format_io}
    assert padded == {"p2", "p3", "p4", "p5"}
    assert padded == {
        tensor.name for tensor in configs["comask_stage1"].output if tensor.is_non_linear_format_io
    }
    assert not any(tensor.is_non_linear_format_io for tensor in stage.output)
    assert list(configs["comask"].dynamic_batching.preferred_batch_size) == [2, 4]


@pytest.mark.parametrize(
    ("engines", "request_", "words"),
    [
        ([], {}, "has no tensorrt engines of fp32; build them: comask build "),
        ([{"plugin": "python"}], {}, "--plugin aot"),
        ([{"flavor": "tensorrt-rtx"}], {}, "has no tensorrt engines"),
        ([{}, {"plugin": "none"}], {}, "one of tensorrt-10.16.1-sm90-nvidia-h200-fp32-aot, "),
        ([{}], {"engines": "other"}, "named other"),
        ([{}], {"max_batch": 5}, "max_batch: expected a whole number from 1 to 4, got 5"),
        ([{"graphs": {"stage1": "1", "stage2": "2"}}], {}, "is not the graph it was built from"),
        ([{"profile": {"batch": (2, 2, 4), "proposals": (1, 200, 200)}}], {}, "batch=1:2:4"),
        ([{"profile": {"batch": (1, 2, 4), "proposals": (1, 50, 50)}}], {}, "takes 50 proposals"),
    ],
)
def test_engines_that_a_server_could_not_run_are_refused(
    bundle: Path,
    tmp_path: Path,
    engines: list[dict[str, Any]],
    request_: dict[str, Any],
    words: str,
) -> None:
    for changes in engines:
        write_fake_engines(bundle, **changes)
    asked = ServeRequest(backend="tensorrt", **request_)
    with pytest.raises((EngineError, ConfigError)) as caught:
        write_repository(Bundle.open(bundle), tmp_path / "out", asked)
    assert words in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}  # nothing is left


def test_one_of_several_engines_can_be_named(bundle: Path, tmp_path: Path) -> None:
    write_fake_engines(bundle)
    named = write_fake_engines(bundle, plugin="none").name
    request = ServeRequest(backend="tensorrt", engines=named)
    write_repository(Bundle.open(bundle), tmp_path / "out", request)
    assert named in (tmp_path / "out" / "comask_stage1" / "1" / "model.plan").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--backend", "tensorrt-rtx"), 1, "does not load TensorRT-RTX's plans"),
        (("--backend", "torch"), 1, "use onnxruntime or tensorrt"),
        (("--backend", "onnxruntime:fp16"), 1, "only fp32; comask export "),
        (("--engines", "x"), 1, "--engines x: the backend onnxruntime uses no engines"),
        (("--model-name", "a/b"), 1, "model name 'a/b'"),
        (("--precision", "fp16"), 2, "No such option '--precision'"),
        (("--batch", "0"), 2, "0 is not in the range"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    micro_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    output = tmp_path / "out"
    result = run("serve", micro_bundle, "--output", output, *arguments)
    assert (result.exit_code, words in result.output) == (code, True), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_usage_and_occupied_folders(micro_bundle: Path, micro_run: Path, tmp_path: Path) -> None:
    checkpoint, full = micro_run / "checkpoint-last.pt", tmp_path / "full"
    full.mkdir()
    (full / "other").write_text("")
    for source, arguments, code, words in [
        (micro_bundle, (), 2, "Missing option '--output'"),
        (checkpoint, ("--output", full), 1, "it is a file, and a bundle is a folder"),
        (micro_bundle, ("--output", full), 1, "and is not a model repository"),
    ]:
        result = run("serve", source, *arguments)
        assert (result.exit_code, words in result.output) == (code, True), result.output
    assert [path.name for path in full.iterdir()] == ["other"]


def test_a_repository_holds_several_bundles_and_a_name_once(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    serve = ("serve", micro_bundle, "--output", repository)
    assert run(*serve).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    for name in ("comask", "comask_stage1"):
        result = run(*serve, "--model-name", name)
        refused = f"error: {repository / name} is there already; give another --model-name"
        assert (result.exit_code, refused in result.output) == (1, True), result.output

    rename = Path.rename

    def full_disk(self: Path, target: Path) -> Path:
        if target.name == "second":  # the last one
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full_disk)
        assert "No space left" in run(*serve, "--model-name", "second").output
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"repository"}
    assert len(list(repository.iterdir())) == 3

    assert run(*serve, "--model-name", "second").exit_code == 0
    assert {path.name for path in repository.iterdir()} == {
        f"{name}{end}" for name in ("comask", "second") for end in ("", "_stage1", "_stage2")
    }


def test_a_damaged_bundle_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    with (bundle / graph_file("stage2", "fp32")).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ComaskError, match="was altered since the export"):
        write_repository(Bundle.open(bundle), tmp_path / "out", ServeRequest())
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_text_format_escapes_and_nests() -> None:
    message = {
        "a": 'q"\\\n',
        "b": [1, 2],
        "c": [{"d": Name("KIND_CPU")}, {"d": Name("X")}],
        "e": {},
    }
    assert to_pbtxt(message) == (
        'a: "q\\"\\\\\\n"\nb: [1, 2]\nc {\n  d: KIND_CPU\n}\nc {\n  d: X\n}\ne {\n}\n'
    )
