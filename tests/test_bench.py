"""`comask bench`: parts, percentiles, what it reports, records and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from standin import counts, live, run_on_standin
from standin_engines import picture, write_engines

from comask.bundle import Bundle, write_manifest
from comask.cli import bench
from comask.config import PreprocessConfig
from comask.errors import ComaskError
from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.bench import machine, memory, timing
from comask.runtime.bench.latency import LatencyReport, measure_latency
from comask.runtime.bench.machine import describe_machine
from comask.runtime.bench.memory import PeakMemory, peak_memory
from comask.runtime.bench.timing import (
    MOST_WARM_UPS,
    PARTS,
    SUM,
    Percentiles,
    check_batch,
    fill_slots,
    full_batches,
    is_steady,
    measure_stream,
    take_turns,
    timed,
    warm_up,
)
from comask.runtime.gpu import Gpu
from comask.runtime.stream import SLOTS

SMALL = PreprocessConfig(short_side=64, max_side=96)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_percentiles_by_their_formula(seconds: list[float]) -> None:
    ordered = sorted(seconds)
    for rank in (50, 90, 99):
        place = rank / 100 * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        expected = ordered[below] + (place - below) * (ordered[above] - ordered[below])
        found = getattr(Percentiles.of(seconds), f"p{rank}")
        assert found == pytest.approx(1000 * expected)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_batches_are_full_of_one_canvas_and_hold_every_image(
    sizes: list[tuple[int, int]], batch: int
) -> None:
    images = [np.full((h, w, 3), i, np.uint8) for i, (h, w) in enumerate(sizes)]
    with_canvas = {
        i: Predictor.prepare(_Preparing(), image).canvas.shape for i, image in enumerate(images)
    }
    batches = full_batches(images, SMALL, batch)
    for group in batches:
        assert len(group) == batch
        assert len({with_canvas[int(image[0, 0, 0])] for image in group}) == 1
    assert {int(image[0, 0, 0]) for group in batches for image in group} == set(range(len(images)))
    needed = {canvas: 0 for canvas in with_canvas.values()}
    for canvas in with_canvas.values():
        needed[canvas] += 1
    assert len(batches) == sum(-(-count // batch) for count in needed.values())


class _Preparing(Predictor):
    """What `Predictor.prepare` needs of one."""

    def __init__(self) -> None:
        self.preprocess = SMALL


def test_steady_is_no_longer_getting_faster() -> None:
    assert not is_steady([1.0, 1.0])
    assert is_steady([1.0, 1.0, 1.0])
    assert is_steady([9.0, 1.0, 1.1, 0.97])
    assert not is_steady([9.0, 1.0, 0.9, 1.0])


def test_parts_add_up_and_find_what_the_predictor_finds(micro_bundle: Path) -> None:
    images = [picture(96, 128, seed) for seed in range(2)]
    with Predictor.load(micro_bundle, "onnxruntime") as predictor:
        seconds, detections = timed(predictor, images)
        assert detections == sum(map(len, predictor(list(images)))) > 0
        assert 0 < warm_up(predictor, [images]) <= MOST_WARM_UPS
        assert warm_up(predictor, [images], 2) == 2
    assert tuple(seconds) == (*PARTS, SUM)
    assert min(seconds.values()) >= 0
    assert seconds[SUM] == pytest.approx(sum(seconds[part] for part in PARTS), rel=1e-6)


def test_backends_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []

    def note(predictor: Any, images: Any) -> tuple[dict[str, float], int]:
        calls.append((predictor, images))
        return dict.fromkeys((*PARTS, SUM), 1.0), 3

    monkeypatch.setattr("comask.runtime.bench.timing.timed", note)
    predictors: Any = {"a": "A", "b": "B"}
    batches: Any = {name: [[1, 2], [3, 4]] for name in "ab"}
    measured = take_turns(predictors, batches, runs=3, warm_ups=1)
    warm, turns = calls[:2], calls[2:]
    assert warm == [("A", [1, 2]), ("B", [1, 2])]
    assert turns == [(name, batch) for batch in ([1, 2], [3, 4], [1, 2]) for name in "AB"]
    assert measured["a"].seconds[SUM] == [1.0] * 3
    assert (measured["b"].images, measured["b"].detections_per_image) == (6, 1.5)
    assert measured["b"].images_per_second == 2.0


def test_a_batch_that_the_backend_splits_is_refused(micro_bundle: Path) -> None:
    with Predictor.load(micro_bundle, "onnxruntime", max_batch=2) as predictor:
        check_batch(predictor, 2)
        with pytest.raises(ComaskError, match="at most 2 images together, a batch of 3"):
            check_batch(predictor, 3)


def test_the_command_measures_reports_and_records(micro_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    photos = tmp_path / "photos"
    assert run("shapes", photos, "--count", 3, "--seed", 1).exit_code == 0
    done = run(
        "bench", bundle, "--backend", "torch", "--backend", "onnxruntime", "--data",
        photos / "images", "--runs", 3, "--warmup", 1, "--batch", 2, "--device", "cpu",
        "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["backends"]) == ["torch", "onnxruntime"]
    assert report["reference"] == "torch"
    assert (report["batch"], report["runs"]) == (2, 3)
    torch, onnxruntime = report["backends"].values()
    assert torch["ratio"] == 1.0
    for found in (torch, onnxruntime):
        parts = found["milliseconds"]
        assert tuple(parts) == (*PARTS, SUM)
        for ranks in parts.values():
            assert 0 <= ranks["p50"] <= ranks["p90"] <= ranks["p99"]
        assert found["stream"] is None
        assert found["warm_ups"] == 1
        assert found["detections_per_image"] > 0
        milliseconds = parts["stage2"]["p99"]
        assert f"{milliseconds:.{2 if milliseconds < 1000 else 0}f}" in done.output
    medians = [b["milliseconds"][SUM]["p50"] for b in (torch, onnxruntime)]
    assert onnxruntime["ratio"] == pytest.approx(medians[0] / medians[1])
    if Path("/proc/self/status").exists():  # the network's libraries alone are larger
        assert torch["resident_bytes"] > onnxruntime["resident_bytes"] > 2**26
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

    assert {found["device"] for found in (torch, onnxruntime)} == {"cpu"}
    recorded = Bundle.open(bundle).manifest.latency
    assert recorded is not None
    assert set(recorded) == {"torch on cpu, batch 2", "onnxruntime:fp32 on cpu, batch 2"}
    entry = recorded["torch on cpu, batch 2"]
    assert entry["seconds"]["sum"] == pytest.approx(medians[0] / 1000)
    assert entry["machine"]["cpu"] == report["machine"]["cpu"]
    assert entry["device"] == "cpu"


def short_bench(bundle: Path, *more: object) -> Any:
    return run("bench", bundle, "--backend", "onnxruntime", "--size", "40x50", "--runs", 1,
               "--warmup", 0, *more, "--json", "-")  # fmt: skip


def test_only_the_own_setting_is_recorded_and_nothing_else_is_lost(
    micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(micro_bundle, tmp_path / "bundle")
    assert short_bench(bundle).exit_code == 0
    recorded = Bundle.open(bundle).manifest.latency
    for option in (("--no-record",), ("--proposals", 20), ("--short-side", 64)):
        again = short_bench(bundle, *option)
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["subject"] == "noise of 40x50"
        assert ("another setting than its own" in again.stderr) == (option != ("--no-record",))
        assert Bundle.open(bundle).manifest.latency == recorded

    def meanwhile(*arguments: Any, **keywords: Any) -> LatencyReport:
        """Another command records what it measured."""
        manifest = Bundle.open(bundle).manifest
        write_manifest(bundle, dataclasses.replace(manifest, parity=[{"backend": "torch"}]))
        return measure_latency(*arguments, **keywords)

    monkeypatch.setattr(bench, "measure_latency", meanwhile)
    assert short_bench(bundle, "--batch", 2).exit_code == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity == [{"backend": "torch"}]
    assert len(manifest.latency or {}) == 2


def test_the_gpu_is_described_where_it_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(f"GPU {index}", 90, 13000, 2**30) for index in range(2)]
    monkeypatch.setattr(machine, "find_gpu", gpus.__getitem__)
    described = [describe_machine(device).gpu for device in ("cpu", None, 1)]  # type: ignore[arg-type]
    assert described == [None, "GPU 0", "GPU 1"]


def test_memory_of_a_process_that_fails_says_why(tmp_path: Path) -> None:
    found = peak_memory(tmp_path, "onnxruntime", (32, 32), LoadOptions(device="cpu"))
    assert (found.resident, found.gpu, found.stream) == (None, None, None)
    assert "no bundle here" in found.problem


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--data", "{photos}", "--size", "9x9"), 2, "give one of them"),
        (("--size", "9"), 2, "expected HxW"),
        (("--runs", "0"), 2, "'--runs': 0 is not in the range"),
        (("--max-loss", "1"), 2, "--max-loss belongs to a command of its own: comask sweep"),
        (("--soak", "1"), 2, "--soak belongs to a command of its own: comask soak"),
        (("--backend", "auto"), 2, "name the backends"),
        (("--backend", "tensorrt"), 1, "error: "),
        (("--proposals", "999999"), 1, "proposals: expected a whole number from 1 to"),
        (("--data", "{photos}"), 1, "the file is empty"),
        (("--data", "nowhere"), 1, "no such file"),
        (("--plot", "a.txt"), 1, "ends in .png"),
        (("--plot", "no/where.png"), 1, "--plot no/where.png: its folder does not exist"),
        (("--json", "no/where"), 1, "--json no/where: its folder does not exist"),
    ],
)
def test_wrong_use(
    micro_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "empty.jpg").write_bytes(b"")
    filled = [argument.format(photos=photos) for argument in arguments]
    done = run("bench", micro_bundle, "--no-record", *filled)
    assert done.exit_code == code, done.output
    assert words in " ".join(done.output.split())


# On the stand-ins.


def check_stream(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    images = [picture(96, 128, seed) for seed in range(3)] + [picture(96, 96, 3)]
    with Predictor.load(folder, "tensorrt") as predictor:
        batches = full_batches(images, predictor.preprocess, 2)
        measured = take_turns({"engine": predictor}, {"engine": batches}, runs=3)["engine"]
        replayed = -counts().graph_launches

        def warm_up(*arguments: Any) -> None:
            nonlocal replayed
            replayed += counts().graph_launches
            fill_slots(*arguments)
            replayed -= counts().graph_launches

        with mock.patch.object(timing, "fill_slots", warm_up):
            found = measure_stream(predictor, batches, runs=3)
        replayed += counts().graph_launches
    for part in ("stage1", "stage2"):
        assert min(measured.seconds[part]) > 0
    assert measured.images == 6
    assert found.slots == SLOTS
    assert found.images_per_second > 0
    assert replayed == 3 + 2 * 4 * SLOTS  # all that is timed, of two canvases
    assert live() == {}


def check_memory(folder: str) -> None:
    import standin_tensorrt

    standin_tensorrt.install()
    write_engines(folder)
    options = {"device": 0, "max_batch": 1, "proposals": None, "short_side": None}
    task = {"bundle": folder, "backend": "tensorrt", "size": (96, 128), "options": options}
    sys.argv[1:] = [json.dumps(task)]
    memory.main()


@pytest.mark.skipif(find_spec("pycuda") is None, reason="pycuda is missing: `make test`")
def test_memory_of_a_stream_has_every_slot(micro_bundle: Path, tmp_path: Path) -> None:
    out = run_on_standin(check_memory, shutil.copytree(micro_bundle, tmp_path / "bundle"))
    found = PeakMemory(**json.loads(out))
    assert found.gpu is not None
    assert found.stream is not None
    # calls have one slot; a stream has SLOTS, each with memory for frames' masks besides
    assert found.stream > SLOTS * 0.9 * found.gpu > 0


@pytest.mark.skipif(find_spec("pycuda") is None, reason="pycuda is missing: `make test`")
def test_engines_are_measured_by_their_stream_too(micro_bundle: Path, tmp_path: Path) -> None:
    run_on_standin(check_stream, shutil.copytree(micro_bundle, tmp_path / "bundle"))
