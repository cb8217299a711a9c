"""`comask job` and its workers: the results of the command, and what happens to bad images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from job_rows import rows_in
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.errors import ComaskError, EngineError
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.jobs import runners
from comask.runtime.jobs import worker as worker_module
from comask.runtime.jobs.folder import Folder
from comask.runtime.jobs.job import Row
from comask.runtime.jobs.worker import Model, Worker

fsspec = pytest.importorskip("fsspec", reason="jobs need comask[jobs]")
pytest.importorskip("pyarrow", reason="Parquet needs comask[jobs]")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five sound images and three that are none."""
    folder = tmp_path / "in put"
    folder.mkdir()
    source = ShapesSource(num_images=5, seed=4)
    for index in range(5):
        Image.fromarray(source.image(index)).save(folder / f"{index}.png")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    return folder


def by_file(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """COCO results by the file's name, for images that could be run."""
    found = {}
    for row in rows:
        if row["error"] is None:
            for entry in row["detections"]:
                del entry["category"]
            found[Path(row["file"]).name] = row["detections"]
    return found


def plain_results(bundle: Path, pictures: Path, output: Path) -> dict[str, list[dict[str, Any]]]:
    """The same of the command without `--runner`."""
    assert run("infer", bundle, pictures, "--output", output, "--save", "coco").exit_code == 1
    images = json.loads((output / "images.json").read_text())
    found: dict[str, list[dict[str, Any]]] = {Path(i["file_name"]).name: [] for i in images}
    for entry in json.loads((output / "detections.json").read_text()):
        found[Path(images[entry.pop("image_id") - 1]["file_name"]).name].append(entry)
    return found


def test_a_job_gives_what_the_command_gives_whatever_the_format_shard_and_storage(
    micro_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    expected = plain_results(micro_bundle, pictures, tmp_path / "plain")
    assert sum(map(len, expected.values())) > 0
    memory = f"memory://{uuid.uuid4()}"
    for path in pictures.iterdir():
        fsspec.filesystem("memory").pipe_file(f"{memory}/in/{path.name}", path.read_bytes())
    for output, inputs, form, shard in [
        (str(tmp_path / "a"), pictures, "parquet", 200),
        (str(tmp_path / "b"), pictures, "jsonl", 1),
        (f"{memory}/out", f"{memory}/in", "parquet", 3),
    ]:
        arguments = ("job", micro_bundle, inputs, "--output", output, "--format", form,
                     "--shard", shard)  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert "5 of 8 images" in result.output
        assert "zero.jpg: " in result.output
        assert result.output.count("skipped:") == 3
        rows = rows_in(Folder(output))
        errors = {Path(row["file"]).name: row["error"] for row in rows if row["error"]}
        assert errors.keys() == {"zero.jpg", "text.png", "cut.png"}
        assert all("\n" not in error and name in error for name, error in errors.items())
        assert by_file(rows) == expected
        again = run(*arguments)
        assert (again.exit_code, "finished already" in again.output) == (1, True), again.output
        assert f"failures: {output}/failures.jsonl" in again.output
    mixed = run("job", micro_bundle, pictures, "--output", tmp_path / "plain")
    assert (mixed.exit_code, " of 'comask infer'" in mixed.output) == (1, True), mixed.output


def test_a_job_goes_on_after_a_signal_and_refuses_other_terms(
    micro_bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = Predictor.predict_stages, []

    def interrupted(self: Predictor, prepared: Any) -> Any:
        calls.append(len(prepared))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, prepared)

    monkeypatch.setattr(Predictor, "predict_stages", interrupted)
    output = tmp_path / "out"
    arguments = (
        "job",
        micro_bundle,
        pictures,
        "--output",
        output,
        "--shard",
        3,
    )
    result = run(*arguments)
    assert result.exit_code == 143, result.output
    assert "interrupted: 3 of 8 images are done; the same command continues" in result.output
    before = {path: path.stat().st_mtime_ns for path in (output / "parts").iterdir()}
    assert len(before) == 1

    for other, words in [
        (("--shard", 2), "holds another job (--shard 3 there, 2 here): "),
        (("--short-side", 32), "--short-side not given there, 32 here"),
        (("--backend", "torch"), "--backend onnxruntime:fp32 there, torch:fp32 here"),
        (("--format", "jsonl"), "--format parquet there, jsonl here"),
        ((tmp_path / "new.png",), "(other images, 8 there, 9 here): "),
    ]:
        shutil.copy(pictures / "0.png", tmp_path / "new.png")
        refused = run(*arguments, *other)
        assert (refused.exit_code, words in refused.output) == (1, True), refused.output

    (pictures / "new.png").write_bytes(b"came later")  # so the job's own listing is named
    result = run("job", micro_bundle, f"@{output}/inputs.jsonl", *arguments[3:])
    assert result.exit_code == 1, result.output
    assert "continues: 3 of 8 images are done" in result.output
    assert "5 of 8 images" in result.output
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(rows_in(Folder(str(output)))) == 8


def test_options_that_do_not_go_together_are_refused(
    micro_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "out")
    for command, arguments, words in [
        ("infer", (*output, "--shard", "3"), "--shard belongs to a command of its own: comask job"),
        ("infer", (*output, "--runner", "ray"), "belongs to a command of its own: comask job"),
        ("infer", ("--output", "memory://out"), "addresses are for comask job"),
        ("job", (*output, "--actors", "2"), "--actors needs --runner ray"),
        ("job", (*output, "--track"), "No such option '--track'"),
        ("job", (*output, "--runner", "ray", "--device", "1"), "Ray assigns GPUs itself"),
    ]:
        result = run(command, micro_bundle, pictures, *arguments)
        assert (result.exit_code, words in result.output) == (2, True), result.output


def test_missing_packages_are_named_at_once(
    micro_bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ("job", micro_bundle, pictures, "--output", tmp_path / "out", "--runner")
    with monkeypatch.context() as patch:
        for package in ("pyarrow", "ray"):
            patch.setitem(sys.modules, package, None)
        result = run(*job, "ray")
        assert result.exit_code == 1
        assert "needs fsspec, pyarrow, ray; not installed: pyarrow, ray: pip " in result.output
        assert "not installed: pyarrow: pip install" in run(*job, "local").output
        assert run(*job, "local", "--format", "jsonl").exit_code == 1  # for the broken images
        assert (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    address = "s3://bucket/*.jpg"
    result = run("job", micro_bundle, address, *job[3:], "local", "--format", "jsonl")
    assert (result.exit_code, ": pip install s3fs" in result.output) == (1, True), result.output
    result = run("infer", micro_bundle, address, "--output", tmp_path / "plain")
    assert "comask job reads addresses of object storage" in result.output


def test_an_image_that_the_backend_cannot_run_is_reported_and_a_broken_backend_is_not(
    micro_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Predictor.predict_stages
    Image.new("RGB", (300, 10)).save(pictures / "wide.png")

    def choosy(self: Predictor, prepared: Any) -> Any:
        if any(image.original_size == (10, 300) for image in prepared):
            raise EngineError("beyond the profile")
        return predict(self, prepared)

    monkeypatch.setattr(Predictor, "predict_stages", choosy)
    worker = Worker(Model(str(micro_bundle), "onnxruntime", LoadOptions()).load())
    names = [str(pictures / name) for name in ("0.png", "wide.png", "1.png")]
    first, wide, last = worker(names)
    assert (first["error"], last["error"]) == (None, None)
    assert wide["error"] == f"{names[1]}: cannot be run: beyond the profile"
    monkeypatch.setattr(Predictor, "predict_stages", lambda self, prepared: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker(names)


def test_a_storage_that_refuses_is_not_the_images_fault(
    micro_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "READ_AGAIN_AFTER", ())
    memory = fsspec.filesystem("memory")
    names = [f"memory://refusing/{number}::a b.png" for number in range(4)]  # no chains of fsspec's
    for name in names:
        memory.pipe_file(name, (pictures / "0.png").read_bytes())
    worker = Worker(Model(str(micro_bundle), "onnxruntime", LoadOptions()).load())
    assert [row["error"] for row in worker(names)] == [None] * 4
    cat, refused = type(memory).cat_file, set(names)

    def cat_file(self: Any, path: str, **bounds: Any) -> Any:
        if any(name.endswith(path) for name in refused):
            raise PermissionError("the token has expired")
        return cat(self, path, **bounds)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    with pytest.raises(ComaskError, match=r"none of 4 images can be fetched: .*the token has exp"):
        worker(names)
    (alone,) = worker(names[:1])
    assert "the token has expired" in alone["error"]
    refused.remove(names[2])
    errors = [row["error"] for row in worker(names)]
    assert [error is None for error in errors] == [False, False, True, False]
    refused.clear()
    memory.store.clear()
    assert all("No such file" in row["error"] for row in worker(names))  # which is known of each


DEADLY = """
import os, signal, time
import comask.runtime.jobs.worker as worker
decode = worker.decode_image
def deadly(source, **options):
    if "deadly" in str(source):
        os.kill(os.getpid(), signal.SIGSEGV)
    if "endless" in str(source):
        time.sleep(1000)
    return decode(source, **options)
worker.decode_image = deadly
"""


def test_images_that_kill_their_process_are_reported_and_the_others_run(
    micro_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "CHILD", DEADLY + runners.CHILD)
    monkeypatch.setattr(runners, "ATTEMPTS", 1)
    monkeypatch.setattr(runners, "LONGEST_IMAGE", 6)  # of a sound one on a busy machine
    for i, fate in ((1, "deadly"), (3, "endless")):
        (pictures / f"{i}.png").rename(pictures / f"{i}.{fate}.png")
    names = sorted(str(path) for path in pictures.iterdir())[:4]
    worker = runners.WorkerApart(Model(str(micro_bundle), "onnxruntime", LoadOptions()))
    rows = worker(names)
    assert worker(names[:1]) == rows[:1]  # by yet another process
    child = worker._child
    worker.close()
    assert child is not None
    assert child._process.returncode is not None
    assert [row["file"] for row in rows] == names
    died = [row for row in rows if "processes in a row" in (row["error"] or "")]
    assert [Path(row["file"]).name for row in died] == ["1.deadly.png", "3.endless.png"]
    assert ["SIGSEGV" in row["error"] for row in died] == [True, False]
    assert died[1]["error"].endswith("no answer within 6 s")
    alone = Worker(Model(str(micro_bundle), "onnxruntime", LoadOptions()).load())
    assert [row for row in rows if row not in died] == alone(
        [name for name in names if "deadly" not in name and "endless" not in name]
    )


def test_a_bundle_that_cannot_be_loaded_is_nobodys_fault_among_the_images(tmp_path: Path) -> None:
    worker = runners.WorkerApart(Model(str(tmp_path), "onnxruntime", LoadOptions()))
    with pytest.raises(ComaskError, match="no bundle here"):
        worker(["a.jpg"])
