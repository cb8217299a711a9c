"""Engines really built by TensorRT-RTX, which needs no GPU for it: what is built, kept and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run

from comask.bundle import Bundle
from comask.errors import BackendUnavailableError, BundleError, EngineError
from comask.export.build_options import BuildOptions, Profile, check_options
from comask.export.engine import EngineRequest, build_engines
from comask.kernels.launch import float32_below
from comask.runtime.gpu import Gpu
from comask.runtime.trt.engine_folder import ENGINES, EngineFolder, find_engines, why_not_on
from comask.runtime.trt.flavor import load_flavor, search_path
from comask.runtime.trt.ops import OPS, kernels_sha256

try:
    load_flavor("tensorrt-rtx")
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

H200 = Gpu("H200", 90, 13000, 2**37)
# Layers whose outputs' sizes depend on the data, or that repeat: a CUDA graph cannot capture them.
UNCAPTURABLE = {
    "NON_ZERO",
    "NMS",
    "LOOP_OUTPUT",
    "TRIP_LIMIT",
    "RECURRENCE",
    "ITERATOR",
    "CONDITION",
}
PARSE = """
import json, sys
import onnx
from comask.export.trt_functions import with_plugins
from comask.runtime.trt.flavor import load_flavor
from comask.runtime.trt.plugins import register_plugins

flavor = load_flavor("tensorrt-rtx")
register_plugins(flavor)
trt, facts = flavor.trt, {}
for path in sys.argv[1:]:
    network = trt.Builder(flavor.log).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.OnnxParser(network, flavor.log)
    assert parser.parse(with_plugins(onnx.load(path)).SerializeToString()), flavor.errors()
    facts[path] = {
        "layers": [network.get_layer(i).type.name for i in range(network.num_layers)],
        "shape inputs": [
            network.get_input(i).name
            for i in range(network.num_inputs)
            if network.get_input(i).is_shape_tensor
        ],
    }
print(json.dumps(facts))
"""
SMALL = ("batch=1:1:2", "height=32:96:128", "width=32:128:128")


def request(bundle: Bundle, plugin: str = "python", **options: Any) -> EngineRequest:
    return EngineRequest(
        flavor="tensorrt-rtx",
        precision="fp32",
        plugin=plugin,
        profile=Profile.of(bundle.manifest, SMALL),
        options=BuildOptions(**options),
    )


@pytest.fixture(scope="module")
def bundle(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy that the engines of this module go into."""
    folder = tmp_path_factory.mktemp("engines") / "bundle with a space"
    shutil.copytree(micro_bundle, folder)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> EngineFolder:
    return build_engines(bundle, request(bundle))


def own_copy(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.folder, folder / "bundle")
    return Bundle.open(folder / "bundle")


def test_both_stages_are_built_with_our_plugins(bundle: Bundle, engines: EngineFolder) -> None:
    info = EngineFolder.open(engines.folder).info
    assert info == engines.info
    assert engines.folder.name == f"tensorrt-rtx-{info.version}-portable-fp32-python"
    nms = [b"NmsOverlaps", b"NmsKeep"]
    for stage, ops in (("stage1", nms), ("stage2", [*nms, b"PyramidRoiAlign"])):
        plan = engines.plan(stage).read_bytes()
        assert all(op in plan for op in ops)  # a plan names its plugins
        assert b"SortedNms" not in plan
        layers = info.layers[stage]
        assert layers.network == {"fp32": layers.of}
        assert layers.engine is None  # there is no GPU to open it on
        assert layers.of > 15
    assert [path.name for path in (bundle.folder / ENGINES).glob(".*")] == [".lock"]


def test_both_stages_can_be_captured(bundle: Bundle, tmp_path: Path) -> None:
    """A shape in host memory, or a size that depends on the data, would need the host in between."""
    path = search_path(tmp_path)
    graphs = [str(bundle.graph(stage, "fp32")) for stage in ("stage1", "stage2")]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *graphs],
        env=os.environ | ({} if path is None else {"LD_LIBRARY_PATH": path}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert list(facts) == graphs
    for stage in facts.values():
        assert len(stage["layers"]) > 20
        assert UNCAPTURABLE.isdisjoint(stage["layers"])
        assert stage["shape inputs"] == []


def test_a_plan_holds_the_numbers_of_its_plugins(bundle: Bundle, engines: EngineFolder) -> None:
    """TensorRT's bindings keep bare pointers to them, so memory that is freed too early shows here."""
    model, plan = bundle.manifest.model, engines.plan("stage2").read_bytes()
    expected = {
        b"sampling_ratio": np.array([model.roi_sampling_ratio], np.int32),
        b"canonical_size": np.array([model.roi_canonical_size], np.float32),
        b"iou_threshold": np.array([float32_below(model.nms_iou)], np.float32),
    }
    for name, number in expected.items():
        places = [match.end() for match in re.finditer(name + b"\\0", plan)]
        assert places
        for place in places:
            assert number.tobytes() in plan[place : place + 32], name


def test_fields_outlive_the_call_that_asked_for_them() -> None:
    from comask.runtime.trt.ops import PyramidRoiAlignOp
    from comask.runtime.trt.plugins import Fields

    trt, op = load_flavor("tensorrt-rtx").trt, PyramidRoiAlignOp(7, 2, 224.0)
    fields = Fields(trt, op.fields(), op.attributes)
    collection, rubbish = fields.collection, []
    for number in range(1000):  # would take the place of freed numbers
        rubbish.append(np.full(1, number, np.int32))
    assert {f.name: np.asarray(f.data).reshape(-1)[0] for f in collection} == op.fields()


def test_maps_cross_channels_last(engines: EngineFolder, micro_fp16: Path, tmp_path: Path) -> None:
    """Of fp16 as well; TensorRT fails where it cannot build a stage with this format."""
    assert engines.info.map_format == "HWC"
    halves = Bundle.open(Path(shutil.copytree(micro_fp16, tmp_path / "bundle")))
    built = build_engines(halves, dataclasses.replace(request(halves), precision="fp16"))
    assert EngineFolder.open(built.folder).info.map_format == "HWC8"
    assert built.info.layers["stage2"].network["fp16"] > 5


def test_the_same_request_builds_nothing(
    bundle: Bundle, engines: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comask.export.engine.build_in_process", None)
    assert build_engines(bundle, request(bundle)).info == engines.info


def test_another_request_is_named_and_rebuilt_when_asked(
    bundle: Bundle, engines: EngineFolder, tmp_path: Path
) -> None:
    copy = own_copy(bundle, tmp_path)
    wider = dataclasses.replace(
        request(copy), profile=Profile.of(copy.manifest, (*SMALL, "batch=1:2:4"))
    )
    with pytest.raises(EngineError, match=r"profile\.batch: \[1, 1, 2\] there, \[1, 2, 4\]"):
        build_engines(copy, wider)
    rebuilt = build_engines(copy, wider, rebuild=True)
    assert rebuilt.info.profile["batch"] == (1, 2, 4)
    assert rebuilt.folder.name == engines.folder.name
    assert [path.name for path in (copy.folder / ENGINES).glob(".*")] == [".lock"]


def test_without_plugins_the_plan_has_none(bundle: Bundle) -> None:
    engines = build_engines(bundle, request(bundle, plugin="none"))
    for stage in ("stage1", "stage2"):
        plan = engines.plan(stage).read_bytes()
        for op in OPS:
            assert op.name.encode() not in plan
    assert engines.info.plugin_sha256 is None
    assert engines.info.map_format == "LINEAR"  # standard layers gather in the maps' own order


def test_a_plan_for_chosen_gpus(bundle: Bundle) -> None:
    engines = build_engines(bundle, request(bundle, compute_capabilities=(86, 89)))
    assert "-sm86-sm89-" in engines.folder.name
    with pytest.raises(
        EngineError, match="--compute-capability 90: this TensorRT-RTX supports only"
    ):
        build_engines(bundle, request(bundle, compute_capabilities=(90,)))


def test_plugins_in_python_are_not_for_later_versions() -> None:
    flavor = dataclasses.replace(load_flavor("tensorrt-rtx"), name="tensorrt")
    options = BuildOptions(version_compatible=True)
    with pytest.raises(EngineError, match="--version-compatible with --plugin python"):
        check_options(flavor, "python", options, H200)
    check_options(flavor, "none", options, H200)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hardware_compatibility": "ampere_plus"}, "its plans run on all GPUs"),
        ({"version_compatible": True}, "no lean runtime"),
    ],
)
def test_options_of_the_other_flavor_are_refused(
    bundle: Bundle, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(EngineError, match=text):
        build_engines(bundle, request(bundle, **options))


def test_a_flavor_that_is_not_installed(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match="pip install tensorrt"):
        build_engines(bundle, dataclasses.replace(request(bundle), flavor="tensorrt"))


def test_what_has_changed_since_is_named(bundle: Bundle, engines: EngineFolder) -> None:
    version, kernels = engines.info.version, kernels_sha256()
    assert engines.mismatches(bundle, version, L4, kernels) == []
    assert engines.mismatches(bundle, version, None, kernels) == ["there is no GPU"]
    (found,) = engines.mismatches(bundle, "1.8", L4, kernels)
    assert "1.8 is installed" in found
    assert version in found
    (found,) = engines.mismatches(bundle, version, L4, "0" * 64)
    assert "kernels" in found
    files = bundle.manifest.files | {"stage1_proposals.onnx": "0" * 64}
    changed = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, files=files))
    (found,) = engines.mismatches(changed, version, L4, kernels)
    assert "stage1_proposals.onnx" in found


AMPERE_PLUS = {"hardware_compatibility": "ampere_plus"}
SAME_CAPABILITY = {"hardware_compatibility": "same_compute_capability"}
L4, T4, H100 = (Gpu(n, c, 13000, 2**34) for n, c in (("L4", 89), ("T4", 75), ("H100", 90)))


@pytest.mark.parametrize(
    ("changes", "gpu", "told"),
    [
        ({"target": "sm90", "gpu": "H200"}, H200, None),
        ({"target": "sm90", "gpu": "H200"}, H100, "the GPU is H100 (sm90), it was tuned on H200"),
        ({"target": "sm90", "gpu": "H200"}, L4, "the GPU is L4 (sm89), it is for sm90"),
        ({"target": "sm90", "gpu": "H200", "options": SAME_CAPABILITY}, H100, None),
        ({"target": "sm90", "gpu": "H200", "options": SAME_CAPABILITY}, L4, "it is for sm90"),
        ({"target": "sm90", "gpu": "H200", "options": AMPERE_PLUS}, L4, None),
        ({"target": "sm90", "gpu": "H200", "options": AMPERE_PLUS}, T4, "for sm80 and later"),
    ],
)
def test_a_plan_of_tensorrt_knows_its_gpus(
    engines: EngineFolder, changes: dict[str, Any], gpu: Gpu, told: str | None
) -> None:
    info = dataclasses.replace(engines.info, flavor="tensorrt", **changes)
    reason = why_not_on(info, gpu)
    assert told in reason if told else reason == ""


@pytest.mark.parametrize(
    ("chosen", "gpu", "fits"),
    [
        ([], L4, True),
        ([], H200, False),
        ([], T4, False),
        (
            [],
            Gpu("GB10", 121, 13000, 2**37),
            True,
        ),  # its TensorRT-RTX decides when it opens the plan
        ([75], T4, True),
        ([86, 89], L4, True),
        ([89], L4, True),
        ([86], L4, False),
        ([89], H200, False),
    ],
)
def test_a_plan_of_rtx_knows_its_gpus(
    engines: EngineFolder, chosen: list[int], gpu: Gpu, fits: bool
) -> None:
    info = dataclasses.replace(engines.info, target="x", options={"compute_capabilities": chosen})
    assert (why_not_on(info, gpu) == "") is fits


@pytest.mark.parametrize(
    ("installed", "fits"), [("10.16.1", True), ("11.4.0", True), ("10.9.0", False), ("9.3", False)]
)
def test_a_version_compatible_plan_runs_under_later_versions(
    bundle: Bundle, engines: EngineFolder, installed: str, fits: bool
) -> None:
    info = dataclasses.replace(
        engines.info, version="10.16.1", options={"version_compatible": True}
    )
    found = EngineFolder(engines.folder, info).mismatches(bundle, installed, L4, kernels_sha256())
    assert (found == []) is fits


def test_models_of_one_capability_have_folders_of_their_own(engines: EngineFolder) -> None:
    names = {
        dataclasses.replace(engines.info, flavor="tensorrt", target="sm89", gpu=gpu).folder_name
        for gpu in ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4080", None)
    }
    assert len(names) == 3
    assert all("/" not in name and " " not in name for name in names)


def test_a_second_build_waits_and_finds_the_first(bundle: Bundle, tmp_path: Path) -> None:
    copy = own_copy(bundle, tmp_path)
    shutil.rmtree(copy.folder / ENGINES, ignore_errors=True)
    left = copy.folder / ENGINES / f".{copy.folder.name}.killed.unfinished"
    left.mkdir(parents=True)
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(build_engines, copy, request(copy), report=lines.append) for _ in range(2)
        ]
        first, second = (job.result() for job in jobs)
    assert first.info == second.info
    assert sum(line.startswith("building stage1") for line in lines) == 1
    assert any("waiting" in line for line in lines)
    assert not left.exists()


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(
    bundle: Bundle, engines: EngineFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = own_copy(bundle, tmp_path)
    (copy.folder / ENGINES / "stray").mkdir()
    found = find_engines(copy)
    assert engines.folder.name in [folder.folder.name for folder in found]
    assert "stray" in caplog.text


def test_an_altered_plan_is_refused(bundle: Bundle, engines: EngineFolder, tmp_path: Path) -> None:
    copy = own_copy(bundle, tmp_path)
    (found,) = [e for e in find_engines(copy) if e.folder.name == engines.folder.name]
    plan = found.folder / "stage1.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match="altered since it was built"):
        found.plan("stage1")
    with pytest.raises(EngineError, match="--rebuild"):
        build_engines(copy, request(copy))
    (found.folder / "engine.json").write_text("{}")
    with pytest.raises(EngineError, match=r"does not describe engines.*--rebuild"):
        build_engines(copy, request(copy))
    assert build_engines(copy, request(copy), rebuild=True).plan("stage1").exists()


def test_an_altered_graph_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = own_copy(bundle, tmp_path)
    graph = copy.folder / "stage1_proposals.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    with pytest.raises(BundleError, match="altered since the export"):
        build_engines(copy, request(copy), rebuild=True)


def test_an_interrupted_build_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    copy = own_copy(bundle, tmp_path)
    shutil.rmtree(copy.folder / ENGINES)

    def interrupt(stage: str, phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, request(copy), progress=interrupt)
    assert [path.name for path in (copy.folder / ENGINES).iterdir()] == [".lock"]


def test_engine_json_is_plain_json(engines: EngineFolder) -> None:
    content = json.loads((engines.folder / "engine.json").read_text())
    assert content["plans"].keys() == content["graphs"].keys() == {"stage1", "stage2"}


# --- the command --------------------------------------------------------------------------------


def test_build_adds_engines_to_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    copy = own_copy(bundle, tmp_path)
    shutil.rmtree(copy.folder / ENGINES)
    profile = [part for text in SMALL for part in ("--profile", text)]
    report = tmp_path / "report.json"
    result = run(
        "build", copy.folder, "--engine", "tensorrt-rtx", *profile, "--workspace", 512,
        "--optimization-level", 1, "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (folder,) = find_engines(copy)
    assert folder.info.options["workspace_mib"] == 512
    assert folder.info.profile["batch"] == (1, 1, 2)
    assert f"{folder.folder}/stage2.plan: " in result.output
    assert "there is no GPU" in folder.info.verification["not_run"]
    assert "these engines were not run: there is no GPU" in result.output
    content = json.loads(report.read_text())["engines"][str(folder.folder)]
    assert content["layers"] == dataclasses.asdict(folder.info)["layers"]
    assert run("doctor", copy.folder).exit_code == 0

    refused = run("build", copy.folder, "--engine", "tensorrt-rtx")
    assert refused.exit_code == 1
    assert "--rebuild" in refused.output.splitlines()[-1]
    assert refused.output.splitlines()[-1].startswith("error: ")


def test_engines_that_are_there_need_no_writing(
    bundle: Bundle, engines: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comask.export.engine.locked", None)  # as on a read-only file system
    assert build_engines(bundle, request(bundle)).info == engines.info


def test_what_cannot_be_built_is_refused_before_graphs_are_made(
    micro_bundle: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(micro_bundle, tmp_path / "bundle"))
    result = run("build", folder, "--engine", "tensorrt", "--precision", "fp16")
    assert result.exit_code == 1
    assert "pip install tensorrt" in result.output
    assert Bundle.open(folder).manifest.precisions == ("fp32",)
    result = run("build", tmp_path / "nothing", "--engine", "tensorrt-rtx")
    assert result.exit_code == 1
    assert "no bundle here: no such folder" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--rebuild"], 2, "Missing option '--engine'"),
        (["--engine", "tensorrt-rtx", "--precision", "int8"], 1, "comask quantize"),
        (["--engine", "tensorrt-rtx", "--profile", "batch=9:1:1"], 1, "1 <= MIN <= BEST <= MAX"),
        (["--engine", "tensorrt-rtx", "--plugin", "aot"], 1, "aot"),
        (["--engine", "tensorrt-rtx", "--version-compatible"], 1, "no lean runtime"),
        (["--engine", "tensorrt"], 1, "pip install tensorrt"),
        (["--engine", "tensorrt-rtx", "--output", "elsewhere"], 2, "No such option '--output'"),
    ],
)
def test_engine_options_that_cannot_be_honoured(
    bundle: Bundle, arguments: list[str], code: int, text: str
) -> None:
    result = run("build", bundle.folder, *arguments)
    assert result.exit_code == code
    assert text in result.output.split("rror: ")[-1]
