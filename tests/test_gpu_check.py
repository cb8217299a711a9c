"""`make gpu-check`: what becomes of its rows, its file and its rehearsal; and `make gpu-upload`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from standin import run_on_standin, skip_without_pycuda
from test_structures import detections

from comask.errors import EngineError, KernelError, KernelUnavailableError
from comask.runtime.device import Stream

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the check by its name."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    return importlib.import_module


@pytest.fixture
def rows(modules: Callable[[str], ModuleType]) -> ModuleType:
    return modules("rows")


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


# The file and the command line.


def test_without_a_gpu_every_row_says_so(tmp_path: Path) -> None:
    result = gpu_check("--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    if content["machine"]["capability"] is not None:
        pytest.skip("this machine has a GPU: run make gpu-check")
    assert result.returncode == 0, result.stderr
    assert {row["status"] for row in content["rows"]} == {"unavailable"}
    assert all("driver" in row["note"] for row in content["rows"])
    assert "0 passed, 0 failed" in result.stdout
    assert content["complete"] is True
    assert max(content["group_seconds"].values()) < 5  # none has started a process


def test_the_file_is_what_the_page_describes(tmp_path: Path) -> None:
    gpu_check("--only", "RoIAlign", "--json", tmp_path / "check.json")
    content = json.loads((tmp_path / "check.json").read_text())
    page = (ROOT / "docs" / "verified" / "README.md").read_text()
    assert content["schema_version"] == 2
    for key in (*content, *content["rows"][0]):
        assert f"`{key}`" in page, key
    assert content["machine"]["python"] == sys.version.split()[0]


def test_the_page_names_rows_and_groups_that_exist(modules: Callable[[str], ModuleType]) -> None:
    groups = modules("groups").GROUPS
    page = (ROOT / "docs" / "verified" / "README.md").read_text()
    listed = page.split("## What is still assumed")[1].split("\n## ")[0]
    rows = {check.name for group in groups for check in group.checks()}
    told = [line.split("|")[3] for line in listed.splitlines() if line.startswith("| ")][1:]
    for cell in told:
        for name in cell.split("`")[1::2]:
            assert any(name in row for row in rows) or name.startswith("tests/"), name
    for group in groups:
        assert f"| `{group.name}` | {len(group.checks())} |" in page, group.name
        assert f"| {group.seconds} |" in page


def test_every_row_says_what_it_compares_and_what_makes_it_fail(
    modules: Callable[[str], ModuleType],
) -> None:
    groups, finders = modules("groups").GROUPS, modules("needs").FINDERS
    checks = {group.name: group.checks() for group in groups}
    every = [check for group in checks.values() for check in group]
    names = [check.name for check in every]
    assert len(set(names)) == len(names)
    provided = {check.provides for check in every} - {""}
    for check in every:
        assert check.compared, check.name
        assert check.fails, check.name
        assert 0 < check.limit <= 600
        for need in check.needs:
            for name in need.split(modules("runner").OR):
                assert name in finders or name in provided, (check.name, name)
    # no row needs what only a later one provides
    assert modules("runner").with_providers(checks, set(names)) == set(names)


def test_groups_and_rows_are_chosen_by_name(modules: Callable[[str], ModuleType]) -> None:
    listed = gpu_check("--list", "--groups", "times,network")
    assert listed.returncode == 0, listed.stderr
    heads = [line for line in listed.stdout.splitlines() if line and not line.startswith(" ")]
    # with those that provide what they need
    assert heads == ["kernels:", "bundle:", "network:", "times:"]
    assert "  kernels compile and load  [" in listed.stdout
    assert "RoIAlign equals" not in listed.stdout
    assert "    fails if it is less than three times as fast" in listed.stdout
    for arguments, words in [
        (("--groups", "kernel"), "no group kernel; expected some of kernels, device"),
        (("--only", "nothing so called"), "no row of these groups contains"),
    ]:
        refused = gpu_check(*arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert words in refused.stderr
    every = {"a": [], "b": []}  # of which nothing is wanted
    assert modules("runner").with_providers(every, set()) == set()


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    result = gpu_check("--bundle", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "no bundle here" in result.stderr


# What becomes of a row.


@pytest.mark.parametrize(
    ("value", "least", "most", "status"),
    [(3.0, 3.0, None, "PASS"), (2.9, 3.0, None, "FAIL"), (0.0, None, 0.0, "PASS"),
     (1e-9, None, 0.0, "FAIL"), (math.nan, None, 1.0, "FAIL"), (math.nan, None, None, "FAIL"),
     (5.0, None, None, "PASS")],
)  # fmt: skip
def test_bars(
    rows: ModuleType, value: float, least: float | None, most: float | None, status: str
) -> None:
    figure = rows.Figure(value=value, least=least, most=most)
    row, need = rows.run_check("g", check_of(rows, "n", lambda context: figure), None)
    assert (row.status, need) == (status, "")
    assert (row.compared, row.fails) == ("nothing", "never")


@pytest.mark.parametrize(
    ("error", "status", "need"),
    [(RuntimeError("wrong\nnumbers"), "FAIL", ""), (AssertionError("no"), "FAIL", ""),
     (ModuleNotFoundError("No module named 'pycuda'", name="pycuda.driver"), "unavailable",
      "module pycuda"),
     (ModuleNotFoundError("No module named 'comask.kernel'", name="comask.kernel"), "FAIL", ""),
     (KernelUnavailableError("no CUDA compiler"), "unavailable", ""),
     (KernelError("cuModuleLoadData failed with 209"), "FAIL", "")],
)  # fmt: skip
def test_a_check_that_raises_is_a_row(
    rows: ModuleType, error: Exception, status: str, need: str
) -> None:
    def check(context: object) -> None:
        raise error

    row, missing = rows.run_check("g", check_of(rows, "n", check), None)
    assert (row.status, missing) == (status, need)
    assert " ".join(str(error).split()) in row.note
    assert "\n" not in row.note


def check_of(rows: ModuleType, name: str, run: Any, **more: Any) -> Any:
    return rows.Check(name=name, run=run, compared="nothing", fails="never", **more)


# A group of rows that do what rows should not; its process imports this module.


def passes(context: object) -> Any:
    import rows

    return rows.Figure(value=float(os.getpid()))


def hangs(context: object) -> None:
    child = subprocess.Popen(["sleep", "100"])
    Path(os.environ["CHILD"]).write_text(str(child.pid))
    time.sleep(100)


def aborts(context: object) -> None:
    os.abort()


def ends(context: object) -> None:
    print("no luck", file=sys.stderr, flush=True)
    os._exit(3)


def dies_later(context: object) -> Any:
    import atexit

    atexit.register(os.abort)
    return passes(context)


def lacks(context: object) -> None:
    import rows

    raise rows.UnavailableError("there is no such thing", "thing")


def fails(context: object) -> None:
    raise RuntimeError("broken")


SERVE = """
import sys
sys.path[:0] = [{script!r}, {tests!r}]
import groups, rows, test_gpu_check
from group_process import serve
from context import REHEARSAL, Context
from pathlib import Path
checks = [
    rows.Check(name=name, run=getattr(test_gpu_check, name.split()[0]), compared="-", fails="-")
    for name in {names!r}
]
context = Context(device="cpu", sizes=REHEARSAL, folder=Path("/"))
serve(groups.Group("g", "", 0, imports=()), checks, context, int(sys.argv[1]))
"""


class Run:
    """A run of rows named by the functions above, each followed by anything to tell them apart."""

    def __init__(
        self, modules: Callable[[str], ModuleType], folder: Path, *names: str,
        each: dict[str, dict[str, Any]] | None = None, more: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.told: list[Any] = []
        self.started = 0
        runner, rows = modules("runner"), modules("rows")
        code = SERVE.format(script=str(SCRIPT), tests=str(ROOT / "tests"), names=names)
        log = folder / "log"

        def launch(group: str) -> Any:
            self.started += 1
            environment = os.environ | {"CHILD": str(folder / "child")}
            return runner.GroupProcess([sys.executable, "-c", code], environment, log)

        self.runner = runner.Runner(launch, self.told.append, **more or {})
        checks = [
            check_of(rows, name, None, **{"limit": 20, **(each or {}).get(name, {})})
            for name in names
        ]
        self.runner.run("g", checks)

    @property
    def statuses(self) -> dict[str, str]:
        return {row.name: row.status for row in self.told}

    def row(self, name: str) -> Any:
        return next(row for row in reversed(self.told) if row.name == name)


def test_a_row_that_takes_too_long_is_killed_with_its_commands(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    run = Run(modules, tmp_path, "passes 1", "hangs", "passes 2", each={"hangs": {"limit": 2}})
    assert run.statuses == {"passes 1": "PASS", "hangs": "FAIL", "passes 2": "PASS"}
    assert "killed: it took more than 2 s" in run.row("hangs").note
    assert 2 <= run.row("hangs").seconds < 10
    assert run.started == 2
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_dies_costs_one_row(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    run = Run(modules, tmp_path, "passes 1", "aborts", "passes 2", "ends", "passes 3")
    assert list(run.statuses.values()) == ["PASS", "FAIL", "PASS", "FAIL", "PASS"]
    assert "its process died with SIGABRT" in run.row("aborts").note
    assert run.row("ends").note == "its process died with exit code 3: no luck"
    assert run.started == 3


def test_a_process_that_dies_at_its_end_spoils_its_last_row(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    each = {"dies_later": {"provides": "proof"}}
    run = Run(modules, tmp_path, "dies_later", each=each)
    assert [row.status for row in run.told] == ["PASS", "FAIL"]
    assert "SIGABRT" in run.told[1].note
    assert "“dies_later” failed" in run.runner.missing["proof"]


def test_what_is_missing_is_remembered(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    each = {
        "lacks": {"provides": "proof"},
        "passes 1": {"needs": ("thing",)},
        "passes 2": {"needs": ("proof",)},
        "passes 3": {"needs": ("proof or C++ compiler",)},
        "passes 4": {"needs": ("proof or thing",)},
        "passes 5": {"needs": ("no such need",)},
    }
    run = Run(modules, tmp_path, "lacks", *list(each)[1:], each=each)
    assert list(run.statuses.values()) == [*["unavailable"] * 3, "PASS", *["unavailable"] * 2]
    assert run.row("passes 1").note == "there is no such thing"
    assert run.row("passes 2").note == ("the row “lacks” is unavailable: there is no such thing")
    assert run.row("passes 5").note == "no row provided: no such need"
    assert run.row("passes 2").seconds == 0
    assert run.started == 1


def test_what_a_failed_row_would_provide_is_not_tried_again(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    each = {
        "fails": {"provides": "bundle"},
        "passes 1": {"needs": ("bundle",), "provides": "engines"},
        "passes 2": {"needs": ("engines",)},
    }
    run = Run(modules, tmp_path, "fails", "passes 1", "passes 2", each=each)
    assert list(run.statuses.values()) == ["FAIL", "unavailable", "unavailable"]
    for name in ("passes 1", "passes 2"):  # both name the root
        assert run.row(name).note.startswith("the row “fails” failed: RuntimeError: broken")
    assert run.started == 1


def test_isolated_rows_have_processes_of_their_own(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    names = ["passes 1", "passes 2", "passes 3", "passes 4"]
    run = Run(modules, tmp_path, *names, each={"passes 3": {"isolated": True}})
    processes = [run.row(name).value for name in names]
    assert processes[0] == processes[1]
    assert len(set(processes)) == 3


def test_a_run_may_be_given_minutes(modules: Callable[[str], ModuleType], tmp_path: Path) -> None:
    start = time.monotonic()
    run = Run(modules, tmp_path, "hangs", "passes", more={"seconds": 3.0})
    assert time.monotonic() - start < 15
    assert run.statuses == {"hangs": "FAIL", "passes": "unavailable"}
    assert "--minutes" in run.row("passes").note


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_leaves_its_rows_and_no_process(tmp_path: Path, end: int) -> None:
    path = tmp_path / "check.json"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--rehearse", "--groups", "kernels", "--json", str(path)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    for _ in range(600):
        if path.exists() and json.loads(path.read_text())["rows"]:
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(end)
    process.wait(20)
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["rows"][0]["status"] == "PASS"
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == [path.name]
    if end != signal.SIGKILL:
        assert process.returncode == 130
        assert not list(tmp_path.glob("comask-*"))
        assert process.stdout is not None
        assert "interrupted; the rows so far count" in process.stdout.read()
    assert children
    for _ in range(100):
        if not any(alive(int(child)) for child in children):
            break
        time.sleep(0.1)
    assert not any(alive(int(child)) for child in children)


# The rehearsal, and whether its rows can fail.


def test_a_rehearsal_runs_the_kernels_on_the_cpu(tmp_path: Path) -> None:
    result = gpu_check("--rehearse", "--only", "equals its CPU", "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["rehearsal"] is True
    assert "rehearsal: small sizes on the CPU" in result.stdout
    assert [row["status"] for row in content["rows"]] == ["PASS"] * 9
    assert all(row["value"] == row["most"] == 0 for row in content["rows"][2:])


@pytest.mark.slow
def test_a_whole_rehearsal(micro_fp16: Path, tmp_path: Path) -> None:
    skip_without_pycuda()
    result = gpu_check("--rehearse", "--bundle", micro_fp16, "--json", tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert result.returncode == 0, [r for r in content["rows"] if r["status"] == "FAIL"]
    unavailable = [row for row in content["rows"] if row["status"] == "unavailable"]
    assert {row["group"] for row in unavailable} <= {"kernels", "device", "video", "int8"}
    assert len(content["rows"]) - len(unavailable) > 120


@pytest.mark.parametrize(
    ("compiles", "status", "then"),
    [("true", "PASS", "PASS"), ("false", "FAIL", "unavailable"),
     ("missing", "unavailable", "unavailable")],
)  # fmt: skip
def test_a_broken_compiler_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str, status: str, then: str
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
    _, first, second = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (first["status"], second["status"]) == (status, then), first
    assert result.returncode == (status == "FAIL")


def in_a_row(folder: str, module: str, name: str, patched: str, /, **arguments: Any) -> None:
    """Runs a row's function on the stand-ins, without something that it is about."""
    sys.path.insert(0, str(SCRIPT))
    import rows
    from context import REHEARSAL, Context

    context = Context(device="cpu", sizes=REHEARSAL, folder=Path(folder), stand_in=True)
    context.install_stand_ins("")
    run = getattr(importlib.import_module(module), name)
    check = check_of(rows, name, lambda context: run(context, **arguments))
    patches: dict[str, Any] = {
        "": lambda: mock.patch.object(Stream, "unpatched", None, create=True),
        "no wait": lambda: mock.patch.object(Stream, "wait_for"),
        "no capture": lambda: mock.patch.object(
            Stream, "capture", side_effect=EngineError("capture failed")
        ),
    }
    with patches[patched]():
        row, _ = rows.run_check("g", check, context)
    print(json.dumps(row.as_json()))


def engines_streamed(folder: str, patched: str) -> None:
    sys.path.insert(0, str(SCRIPT))
    import building
    from context import REHEARSAL, Context

    context = Context(device="cpu", sizes=REHEARSAL, folder=Path(folder), stand_in=True)
    context.install_stand_ins("")
    building.build_engine(context, building.engine_bundle(context, "tensorrt"), "tensorrt", "fp16")
    in_a_row(folder, "engines", "streamed", patched, flavor="tensorrt")


def frames_written_late(folder: str, patched: str) -> None:
    in_a_row(folder, "shared_frames", "written_late", patched, name="torch", interface="cai")


def streams_waiting(folder: str, patched: str) -> None:
    in_a_row(folder, "device", "streams_wait", patched)


@pytest.mark.parametrize(
    ("function", "patched", "words"),
    [(engines_streamed, "", None),
     (engines_streamed, "no capture", "0 of 12 frames were graphs, with graphs=True"),
     (frames_written_late, "", None), (frames_written_late, "no wait", ""),
     (streams_waiting, "", None), (streams_waiting, "no wait", "")],
)  # fmt: skip
def test_rows_fail_without_what_they_are_about(
    micro_fp16: Path, tmp_path: Path, function: Any, patched: str, words: str | None
) -> None:
    skip_without_pycuda()
    shutil.copytree(micro_fp16, tmp_path / "trained-bundle")
    row = json.loads(run_on_standin(function, tmp_path, patched).splitlines()[-1])
    assert row["status"] == ("PASS" if words is None else "FAIL"), row
    assert (words or "") in row["note"]


@pytest.mark.parametrize("field", ["boxes_xyxy", "scores", "mask_probs", "labels"])
def test_detections_differ_in_any_field(modules: Callable[[str], ModuleType], field: str) -> None:
    distance = modules("stand_in_session").distance
    found = detections()
    assert distance(found, found) == 0
    changed = getattr(found, field).copy()
    changed.flat[0] += 1
    assert distance(found, dataclasses.replace(found, **{field: changed})) > 0.01
    assert distance(found, found[1:]) == math.inf


def test_engines_that_were_not_built_here_are_an_error(
    modules: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    building, context = modules("building"), modules("context")
    (tmp_path / "trained-bundle").mkdir()
    here = context.Context(device="cuda", sizes=context.REHEARSAL, folder=tmp_path)
    copies = {building.engine_bundle(here, "tensorrt", plugin) for plugin in ("python", "aot")}
    copies.add(building.engine_bundle(here, "tensorrt-rtx", "aot"))
    copies.add(building.engine_bundle(here, "tensorrt", "aot", label="int8"))
    assert len(copies) == 4

    def built(*plugins: str, reason: str = "") -> Iterator[Any]:
        from contextlib import ExitStack

        stack = ExitStack()
        infos = [
            mock.Mock(
                flavor="tensorrt", plugin=p, precision="fp16", verification={"not_run": reason}
            )
            for p in plugins
        ]
        for target, value in {
            "comask.runtime.trt.engine_folder.find_engines": [mock.Mock(info=i) for i in infos],
            "comask.bundle.Bundle.open": None,
            "comask.runtime.trt.flavor.load_flavor": None,
            "comask.export.build_options.check_options": None,
        }.items():
            stack.enter_context(mock.patch(target, return_value=value))
        stack.enter_context(mock.patch.object(context.Context, "command", return_value=""))
        return stack  # type: ignore[return-value]

    with built("aot"):
        assert building.build_engine(here, tmp_path, "tensorrt", "fp16", "aot")[0].plugin == "aot"
    for plugins in (("python",), ("python", "aot"), ()):
        with built(*plugins), pytest.raises(RuntimeError, match="not tensorrt with aot"):
            building.build_engine(here, tmp_path, "tensorrt", "fp16", "aot")
    with (
        built("aot", reason="this GPU is not supported"),
        pytest.raises(modules("rows").UnavailableError, match="cannot run here: this GPU"),
    ):
        building.build_engine(here, tmp_path, "tensorrt", "fp16", "aot")


# What is uploaded.


def test_parts_keep_their_limit(modules: Callable[[str], ModuleType], tmp_path: Path) -> None:
    upload = modules("upload")

    def item(name: str, size: int) -> Any:
        file = tmp_path / name
        file.write_bytes(bytes(size))
        return upload.Item("wheels", (file,))

    items = [item("a", 50), item("b", 40), item("c", 60), item("d", 10)]
    parts = upload.pack(items, 100)
    assert [[i.files[0].name for i in part] for part in parts] == [["a", "b", "d"], ["c"]]
    with pytest.raises(upload.UploadError, match=r"^c: 0\.0 MiB, but a part has"):
        upload.pack(items, 59)
    (tmp_path / "out" / "9").mkdir(parents=True)
    upload.write(parts, tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("?"))
    assert found == ["1", "1/wheels/a", "1/wheels/b", "1/wheels/d", "2", "2/wheels/c"]


def test_what_cannot_be_uploaded_is_said(
    modules: Callable[[str], ModuleType], tmp_path: Path, micro_bundle: Path
) -> None:
    for arguments, words in [
        (("--bundle", tmp_path), "there is no bundle here; `make demo`"),
        (("--bundle", micro_bundle, "--limit", "1"), "MiB, but a part has"),
    ]:
        done = subprocess.run(
            [sys.executable, str(SCRIPT / "upload.py"), "--output", tmp_path / "o", *map(str, arguments)],
            capture_output=True, text=True, env=os.environ | {"PIP_NO_INDEX": "1"},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert not (tmp_path / "o").exists()


def test_what_rows_need_can_be_uploaded(modules: Callable[[str], ModuleType]) -> None:
    upload, needs = modules("upload"), modules("needs")
    named = {name for line in upload.NEEDED for name in line} | {"pycuda"}
    assert len(upload.requirements(sorted(named))) == len(named)
    for module, packages in needs.PACKAGES.values():
        for package in packages.split():
            there = package in named or package in upload.THERE
            assert there or package.startswith("tensorrt"), (module, package)


def test_uploaded_packages_are_used(
    modules: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "comask_uploaded.py").write_text("found = True\n")
    (project / "setup.py").write_text(
        "from setuptools import setup; setup(name='comask-uploaded', version='1', "
        "py_modules=['comask_uploaded'])"
    )
    folder = tmp_path / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*build, "--wheel-dir", folder, project], check=True, capture_output=True)
    shutil.copy(next(folder.iterdir()), folder / "numpy-1.0-py3-none-any.whl")  # is there already
    monkeypatch.setenv("PYTHONPATH", "/first")
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules("wheels").use([folder], tmp_path / "site")
    assert importlib.import_module("comask_uploaded").found
    assert os.environ["PYTHONPATH"] == f"/first:{tmp_path / 'site'}"
    assert not (tmp_path / "site" / "numpy").exists()
