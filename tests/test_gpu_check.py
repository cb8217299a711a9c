"""`make gpu-check`: its table where there is no GPU, its rehearsal, and how a row fails."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from standin import run_on_standin, skip_without_pycuda
from test_structures import detections

from comask.errors import EngineError, KernelError, KernelUnavailableError
from comask.runtime import Predictor
from comask.runtime.device import Stream

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT))
    import rows

    return rows


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_without_a_gpu_every_row_says_so(tmp_path: Path) -> None:
    result = gpu_check("--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    if content["machine"]["capability"] is not None:
        pytest.skip("this machine has a GPU: run make gpu-check")
    assert result.returncode == 0, result.stderr
    assert {row["status"] for row in content["rows"]} == {"unavailable"}
    assert all("driver" in row["note"] for row in content["rows"])
    assert "0 passed, 0 failed" in result.stdout


def test_the_file_is_what_the_page_describes(tmp_path: Path) -> None:
    gpu_check("--only", "RoIAlign", "--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    page = (ROOT / "docs" / "verified" / "README.md").read_text()
    assert content["schema_version"] == 1
    for key in (*content, *content["rows"][0]):
        assert f"`{key}`" in page, key
    assert content["machine"]["python"] == sys.version.split()[0]


def test_a_rehearsal_runs_the_kernels_on_the_cpu(tmp_path: Path) -> None:
    result = gpu_check("--rehearse", "--only", "equals torchvision", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rehearsal"] is True
    assert [row["status"] for row in content["rows"]] == ["PASS"] * 4
    assert all(0 <= row["value"] <= row["most"] for row in content["rows"])


@pytest.mark.parametrize(
    ("value", "least", "most", "status"),
    [(3.0, 3.0, None, "PASS"), (2.9, 3.0, None, "FAIL"), (0.0, None, 0.0, "PASS"),
     (1e-9, None, 0.0, "FAIL"), (math.nan, None, 1.0, "FAIL"), (math.nan, None, None, "FAIL"),
     (5.0, None, None, "PASS")],
)  # fmt: skip
def test_bars(
    rows: ModuleType, value: float, least: float | None, most: float | None, status: str
) -> None:
    row = rows.run_check(
        "g", "n", lambda context: rows.Figure(value=value, least=least, most=most), None
    )
    assert row.status == status


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("wrong\nnumbers"), "FAIL"), (AssertionError("no"), "FAIL"),
     (ModuleNotFoundError("No module named 'pycuda'", name="pycuda"), "unavailable"),
     (ModuleNotFoundError("No module named 'comask.kernel'", name="comask.kernel"), "FAIL"),
     (KernelUnavailableError("no CUDA compiler"), "unavailable"),
     (KernelError("cuModuleLoadData failed with 209"), "FAIL")],
)  # fmt: skip
def test_a_check_that_raises_is_a_row(rows: ModuleType, error: Exception, status: str) -> None:
    def check(context: object) -> None:
        raise error

    row = rows.run_check("g", "n", check, None)
    assert row.status == status
    assert " ".join(str(error).split()) in row.note
    assert "\n" not in row.note


@pytest.mark.parametrize(
    ("death", "words"),
    [("os.abort()", "died with SIGABRT"), ("sys.exit('no luck')", "exit code 1: no luck")],
)
def test_a_row_whose_process_dies_is_a_failure(rows: ModuleType, death: str, words: str) -> None:
    command = [sys.executable, "-c", f"import os, sys; {death}"]
    done = subprocess.run(command, capture_output=True, text=True)
    row = rows.finished_row("g", "n", done)
    assert row.status == "FAIL"
    assert words in row.note


@pytest.mark.parametrize(
    ("compiles", "status"), [("true", "PASS"), ("false", "FAIL"), ("missing", "unavailable")]
)
def test_a_broken_compiler_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str, status: str
) -> None:
    """The rehearsal's kernels are those of the CPU, so $CXX decides."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo 1 || {{ {compiles} && exec g++ $@; }}\n"
    )
    if compiles != "missing":
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COMASK_CACHE", str(tmp_path))
    name = "NMS keeps what torchvision keeps"
    result = gpu_check("--rehearse", "--only", name, "--json", tmp_path / "r.json")
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["status"] == status, row
    assert result.returncode == (status == "FAIL")


def test_each_flavor_and_plugin_has_a_bundle_of_its_own(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import backends
    import context

    bundle = tmp_path / "mine"
    (bundle / "engines" / "old").mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    shared = context.Context(device="cuda", sizes=context.REHEARSAL, folder=tmp_path)
    copies = {shared.without_engines(bundle, "tensorrt", plugin) for plugin in backends.PLUGINS}
    assert len(copies) == 3
    for copy in copies:
        assert [path.name for path in copy.iterdir()] == ["manifest.json"]

    def built(*plugins: str) -> None:
        infos = [SimpleNamespace(flavor="tensorrt", plugin=p, precision="fp16") for p in plugins]
        folders = [SimpleNamespace(info=info) for info in infos]
        monkeypatch.setattr("comask.runtime.trt.engine_folder.find_engines", lambda bundle: folders)

    monkeypatch.setattr("comask.bundle.Bundle.open", lambda folder: folder)
    monkeypatch.setattr("comask.runtime.trt.engine.load_flavor", lambda flavor: None)
    monkeypatch.setattr("comask.export.build_options.check_options", lambda *arguments: None)
    monkeypatch.setattr(context.Context, "command", lambda *arguments: "")
    built("aot")
    found = backends.build_engine(shared, bundle, "tensorrt", "fp16", "aot")
    assert found == shared.without_engines(bundle, "tensorrt", "aot")
    for plugins in (("python",), ("python", "aot"), ()):
        built(*plugins)
        with pytest.raises(RuntimeError, match="not tensorrt with aot"):
            backends.build_engine(shared, bundle, "tensorrt", "fp16", "aot")


def check_streamed(folder: str, failing: bool) -> None:
    """The row of streamed frames on the stand-ins, with graphs or without any."""
    import standin_tensorrt
    from standin_engines import write_engines

    sys.path.insert(0, str(SCRIPT))
    import rows
    import speed
    from context import REHEARSAL, Context

    standin_tensorrt.install()
    write_engines(folder)
    context = Context(device="cuda", sizes=REHEARSAL, folder=Path(folder), trained=Path(folder))

    load = Predictor.load
    capture = EngineError("capture failed") if failing else Stream.capture
    with (
        mock.patch.object(speed, "build_engine", return_value=Path(folder)),
        # the stand-in's engines are in fp32
        mock.patch.object(Predictor, "load", side_effect=lambda *_: load(folder, "tensorrt")),
        mock.patch.object(Stream, "capture", autospec=True, side_effect=capture),
    ):
        row = rows.run_check(
            "speed", "streamed", partial(speed.streamed, flavor="tensorrt"), context
        )
    print(json.dumps(row.as_json()))


@pytest.mark.parametrize("failing", [False, True])
def test_streamed_frames_pass_by_replayed_graphs_alone(
    micro_bundle: Path, tmp_path: Path, failing: bool
) -> None:
    skip_without_pycuda()
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    row = json.loads(run_on_standin(check_streamed, bundle, failing).splitlines()[-1])
    assert row["status"] == ("FAIL" if failing else "PASS"), row
    assert failing == ("0 of 32 frames were graphs, with graphs=True" in row["note"])


@pytest.mark.parametrize("field", ["boxes_xyxy", "scores", "mask_probs", "labels"])
def test_streamed_frames_differ_in_any_field(rows: ModuleType, field: str) -> None:
    import speed

    found = detections()
    assert speed.distance(found, found) == 0
    changed = getattr(found, field).copy()
    changed.flat[0] += 1
    assert speed.distance(found, dataclasses.replace(found, **{field: changed})) > 0.01
    assert speed.distance(found, found[1:]) == math.inf


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    result = gpu_check("--bundle", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "no bundle here" in result.stderr
