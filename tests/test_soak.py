"""`comask soak`: planted leaks are named, a clean run passes, a signal ends it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run

from comask.runtime import Predictor
from comask.runtime.backends import LoadOptions
from comask.runtime.backends.ort import OrtSession
from comask.runtime.bench import machine
from comask.runtime.bench import soak as soaking

pytestmark = pytest.mark.skipif(
    not machine.STATUS.exists(), reason="memory, threads and files are read from /proc"
)
SECONDS = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    assert run("shapes", folder, "--count", 1, "--seed", 3).exit_code == 0
    return folder / "images"


def soak(bundle: Path, photos: Path, *more: object, seconds: float = SECONDS) -> Any:
    return run("soak", bundle, "--backend", "onnxruntime", "--minutes", seconds / 60, "--data",
               photos, "--device", "cpu", *more)  # fmt: skip


def soak_predictor(
    predictor: Predictor, images: list[soaking.Encoded], seconds: float
) -> soaking.SoakReport:
    return soaking.soak(
        predictor, images, seconds / 60, bundle=Path(), how=LoadOptions(), subject="images"
    )


@pytest.fixture(autouse=True)
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Has something done before each run of a stage, which repeats what it gave for such inputs before:
    rounds are short, as what is tested is not the network."""
    original, given = OrtSession.run, dict[Any, Any]()

    def again(self: OrtSession, feeds: Any, keep: Any = ()) -> Any:
        key = id(self), feeds.get("images", feeds["image_sizes"]).tobytes()
        if key not in given:
            given[key] = original(self, feeds)
        return given[key]

    def planted(before: Callable[[], object]) -> None:
        def leaking(self: OrtSession, feeds: Any, keep: Any = ()) -> Any:
            before()
            return again(self, feeds)

        monkeypatch.setattr(OrtSession, "run", leaking)

    monkeypatch.setattr(OrtSession, "run", again)
    return planted


def test_a_clean_run_passes(micro_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path in photos.iterdir():
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"not at all")
    manifest = (micro_bundle / "manifest.json").read_bytes()
    done = soak(micro_bundle, tmp_path / "photos", "--json", tmp_path / "r.json", "--plot",
                tmp_path / "r.png", seconds=5)  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    # other tests in this process leave memory behind, and others on this machine take time
    growth = {n: g for n, g in report["growth"].items() if n in ("threads", "files", "unreadable")}
    assert len(growth) == 3
    assert all(g["passed"] for g in growth.values())
    assert report["judged"]
    assert "skipped: " in done.output
    assert "bad.jpg" in done.output
    rounds = report["rounds"]
    assert report["images"] == 2 * rounds
    assert report["unreadable"] == 2 * 3 * rounds  # the bad file, and those that are always there
    assert report["detections"] > 0
    assert len(report["times"]) <= rounds
    assert all(len(s) == len(report["times"]) for s in report["series"].values())
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (micro_bundle / "manifest.json").read_bytes() == manifest
    assert (done.exit_code == 0) == report["passed"], done.output


def memory(kept: list[Any]) -> None:
    kept.append(np.ones(2**17))  # 1 MiB


def files(kept: list[Any]) -> None:
    kept.append(os.open(os.devnull, os.O_RDONLY))


def threads(kept: list[Any]) -> None:
    """One of 20 times, or there would be thousands."""
    kept.append(threading.Event())
    if len(kept) % 20 == 0:
        threading.Thread(target=kept[-1].wait, daemon=True).start()


def slower(kept: list[Any]) -> None:
    time.sleep(delay(kept))


def busier(kept: list[Any]) -> None:
    end = time.thread_time() + delay(kept)
    while time.thread_time() < end:
        pass


def delay(kept: list[Any]) -> float:
    """4 ms more each second."""
    kept.append(time.monotonic())
    return float(4e-3 * (kept[-1] - kept[0]))


@pytest.fixture
def kept() -> Iterator[list[Any]]:
    entries: list[Any] = []
    yield entries
    for entry in entries:
        if isinstance(entry, threading.Event):
            entry.set()
        elif isinstance(entry, int):
            os.close(entry)
    entries.clear()
    gc.collect()


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        (memory, "resident memory grew by"),
        (files, "open files grew by"),
        (threads, "threads grew by"),
        (slower, "latency p50 grew by"),
        (busier, "CPU time per image grew by"),
    ],
    ids=lambda leak: getattr(leak, "__name__", ""),
)
def test_a_planted_leak_is_named(
    micro_bundle: Path, photos: Path, plant: Any, kept: list[Any],
    leak: Callable[[list[Any]], None], words: str,
) -> None:  # fmt: skip
    plant(lambda: leak(kept))
    done = soak(micro_bundle, photos)
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "limit" in line
    assert "TOO MUCH" in done.output


def test_a_run_that_breaks_down_says_when_and_why(
    micro_bundle: Path, photos: Path, plant: Any, tmp_path: Path
) -> None:
    count = itertools.count()

    def fail() -> None:
        if next(count) > 40:
            raise OSError(24, "Too many open files")

    plant(fail)
    done = soak(micro_bundle, photos, "--json", tmp_path / "r.json")
    assert done.exit_code == 1
    assert "error: the run broke down after 0." in done.output
    assert "Too many open files" in done.output
    assert json.loads((tmp_path / "r.json").read_text())["rounds"] > 0


def test_too_short_a_run_is_not_passed(micro_bundle: Path, photos: Path, plant: Any) -> None:
    plant(lambda: time.sleep(0.1))
    done = soak(micro_bundle, photos, seconds=1)
    assert done.exit_code == 1
    (interval,) = re.findall(
        r"warning: a round takes (\S+) s, so this run will be too", done.output
    )
    assert float(interval) >= 0.4  # both stages, by a call and in a stream
    assert "error: too short to judge: " in done.output
    assert "give --minutes" in done.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_what_there_is_is_judged(
    micro_bundle: Path, photos: Path, plant: Any, tmp_path: Path, number: signal.Signals, code: int
) -> None:  # fmt: skip
    count = itertools.count()

    def interrupt() -> None:
        if next(count) == 30:
            os.kill(os.getpid(), number)

    plant(interrupt)
    done = soak(micro_bundle, photos, "--json", tmp_path / "r.json", seconds=3600)
    assert done.exit_code == code, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["interrupted"], report["judged"], report["passed"]) == (True, False, False)
    assert "interrupted: too short to judge" in done.output


def test_noise_comes_in_all_shapes_and_broken_images_are_broken(micro_bundle: Path) -> None:
    from comask.errors import ImageError
    from comask.preprocess import decode_image

    with Predictor.load(micro_bundle, "onnxruntime", device="cpu") as predictor:
        noise = soaking.noise_images(predictor.preprocess)
        assert len({predictor.prepare(decode_image(i)).canvas.shape for i in noise}) > 2
        report = soak_predictor(predictor, noise[:1], 0.1)
    assert "broke down" not in report.verdict
    assert report.images == 2 * report.rounds > 0
    assert isinstance(noise[0], bytes)
    for broken in soaking.broken_images(noise[0]):
        with pytest.raises(ImageError):
            decode_image(broken)


def test_time_that_others_had_is_deducted(
    micro_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photo,) = photos.iterdir()
    monkeypatch.setattr(soaking, "waited_seconds", lambda: 0.75 * time.perf_counter())
    calls = []
    with Predictor.load(micro_bundle, "onnxruntime", device="cpu") as predictor:
        plain = predictor.predict_stages

        def slow(prepared: Any) -> Any:
            time.sleep(0.1)
            calls.append(plain(prepared))
            return calls[-1]

        monkeypatch.setattr(predictor, "predict_stages", slow)
        report = soak_predictor(predictor, [photo], 0.5)
    assert calls
    np.testing.assert_allclose(report.series["waited"], 0.75, atol=0.01)
    assert 25 < min(report.series["call_p50_ms"]) < 100  # it took more


@pytest.mark.skipif(not machine.SCHEDULE.exists(), reason="this kernel counts no waiting")
def test_waiting_is_what_the_kernel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no real competition: which of two busy processes runs, and for how long, is the kernel's."""
    before = machine.waited_seconds()
    assert 0 <= before <= machine.waited_seconds()
    told = tmp_path / "schedstat"  # ns on the processor, ns that it was waited for, turns
    told.write_text("141915783702 69920289779 28919\n")
    monkeypatch.setattr(machine, "SCHEDULE", told)
    assert machine.waited_seconds() == pytest.approx(69.920289779)
    told.unlink()
    assert machine.waited_seconds() == 0


def test_files_that_no_longer_can_be_read_end_it(micro_bundle: Path, photos: Path) -> None:
    with Predictor.load(micro_bundle, "onnxruntime", device="cpu") as predictor:
        report = soak_predictor(predictor, [b"no image"], 5)
    assert "the run broke down after" in report.verdict
    assert "no image can be read" in report.verdict
    assert not report.passed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--minutes", 0), "0.0 is not in the range"),
        (("--minutes", "nan"), "expected a number of minutes"),
        (("--minutes", "inf"), "expected a number of minutes"),
        (("--backend", "torch", "--backend", "onnxruntime"), "runs one backend"),
        (("--size", "9x9"), "No such option '--size'"),
        (("--runs", 20), "No such option '--runs'"),
        (("--no-record",), "No such option '--no-record'"),
    ],
)
def test_wrong_use(micro_bundle: Path, arguments: tuple[object, ...], words: str) -> None:
    done = run("soak", micro_bundle, *arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_without_proc_it_says_so(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "STATUS", tmp_path / "nowhere")
    done = run("soak", micro_bundle, "--minutes", 1)
    assert done.exit_code == 1
    assert "needs Linux" in done.output
