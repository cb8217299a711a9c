"""`comask sweep`: the Pareto front, the choice within a loss, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_reports import sweep_report
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from comask.errors import ComaskError
from comask.runtime import Predictor
from comask.runtime.bench import timing
from comask.runtime.bench.plots import top_of_losses
from comask.runtime.bench.sweep import Scored, Sweep, choose, pareto_front

OWN = Scored(
    backend="torch", proposals=200, short_side=96, batch=1, box_ap=60.0, mask_ap=50.0, loss=0.0,
    ms_per_image=20.0, ms_per_batch=20.0,
)  # fmt: skip


def scored(ms: float, loss: float, batch: int = 1) -> Scored:
    return Scored(
        backend="onnxruntime", proposals=100, short_side=96, batch=batch, box_ap=60 - loss,
        mask_ap=50, loss=loss, ms_per_image=ms, ms_per_batch=ms * batch,
    )  # fmt: skip


POINTS = st.lists(
    st.builds(scored, st.integers(1, 6).map(float), st.integers(-2, 4).map(float)), max_size=12
)


@given(POINTS)
def test_front_is_what_nothing_beats(points: list[Scored]) -> None:
    def beats(a: Scored, b: Scored) -> bool:
        no_worse = a.ms_per_image <= b.ms_per_image and a.loss <= b.loss
        return no_worse and (a.ms_per_image < b.ms_per_image or a.loss < b.loss)

    expected = [p for p in points if not any(beats(other, p) for other in points)]
    found = pareto_front(points)
    assert sorted(map(id, found)) == sorted(map(id, expected))
    assert [p.ms_per_image for p in found] == sorted(p.ms_per_image for p in found)


@given(POINTS, st.floats(0, 5))
def test_choice_is_the_fastest_within_the_loss_and_on_its_front(
    points: list[Scored], max_loss: float
) -> None:
    points = [OWN, *points]
    chosen = choose(points, max_loss)
    assert chosen.loss <= max_loss
    assert all(p.ms_per_image >= chosen.ms_per_image for p in points if p.loss <= max_loss)
    assert chosen in pareto_front(points)


def test_choice_on_made_up_numbers() -> None:
    points = [OWN, scored(12, 0.2), scored(9, 0.6), scored(11, 0.5), scored(8, 1.5, batch=4)]
    expected = {0.0: 20, 0.2: 12, 0.5: 11, 1.0: 9, 2.0: 8}
    for max_loss, ms in expected.items():
        assert choose(points, max_loss).ms_per_image == ms


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert run("shapes", folder, "--count", 4, "--seed", 8).exit_code == 0
    return folder


def sweep(bundle: Path, data: Path | str, *more: object) -> Any:
    return run("sweep", bundle, "--data", data, "--runs", 1, "--backend", "onnxruntime", *more)


def test_the_command(micro_bundle: Path, data: Path, tmp_path: Path) -> None:
    done = sweep(
        micro_bundle, data, "--grid", "proposals=40,7", "--grid", "short-side=64",
        "--grid", "batch=1,2", "--max-loss", "100", "--limit", "3",
        "--json", tmp_path / "r.json", "--plot", tmp_path / "r.svg",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    settings = report["settings"]
    grid = {(p, s, b) for p in (40, 7) for s in (64,) for b in (1, 2)} | {(200, 96, 1)}
    assert {(e["proposals"], e["short_side"], e["batch"]) for e in settings} == grid
    assert (report["images"], report["finished"], report["skipped"]) == (3, True, [])
    (own,) = [e for e in settings if e["reference"]]
    assert (own["proposals"], own["loss"], own["ratio"]) == (200, 0, 1)
    for entry in settings:
        loss = max(own["box_ap"] - entry["box_ap"], own["mask_ap"] - entry["mask_ap"])
        assert entry["loss"] == pytest.approx(loss)
        assert entry["ms_per_image"] == pytest.approx(entry["ms_per_batch"] / entry["batch"])
    # AP is that of comask eval, and no business of the batch
    ap = {
        (e["proposals"], e["short_side"], e["box_ap"], e["mask_ap"])
        for e in settings
        if e["short_side"] == 64
    }
    assert len(ap) == 2
    for proposals, side, box_ap, mask_ap in ap:
        run("eval", micro_bundle, "--data", data, "--limit", 3, "--backend", "onnxruntime",
            "--no-record", "--proposals", proposals, "--short-side", side,
            "--json", tmp_path / "e.json")  # fmt: skip
        values = json.loads((tmp_path / "e.json").read_text())["backends"]["onnxruntime"]
        assert values["bbox"]["AP"] == pytest.approx(box_ap)
        assert values["segm"]["AP"] == pytest.approx(mask_ap)
    # everything is within 100 points
    assert settings[0]["chosen"]
    chosen = settings[0]
    assert report["command"] in done.output.replace("\n", " ").replace("  ", " ")
    assert report["command"].endswith(
        f"--backend onnxruntime --batch {chosen['batch']} --proposals {chosen['proposals']}"
        + (" --short-side 64" if chosen["short_side"] == 64 else "")
    )
    assert f"proposals={chosen['proposals']}" in report["python"]
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_printed_usage_runs(micro_bundle: Path, data: Path, tmp_path: Path) -> None:
    done = sweep(micro_bundle, data, "--grid", "proposals=7", "--grid", "short-side=64",
                 "--grid", "batch=2", "--max-loss", "100", "--json", tmp_path / "r.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    command = report["command"].split()
    command[command.index("INPUT")] = str(data / "images")
    command[command.index("DIR")] = str(tmp_path / "out")
    assert command.pop(0) == "comask"
    assert run(*command).exit_code == 0
    with eval(report["python"]) as predictor:
        chosen = next(e for e in report["settings"] if e["chosen"])
        assert predictor.preprocess.short_side == chosen["short_side"]
        assert (predictor.stages.proposals or 200) == chosen["proposals"]


def test_settings_that_cannot_run_are_skipped(
    micro_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(predictor: Predictor, batch: int) -> None:
        if batch > 1:
            raise ComaskError("too many together")

    monkeypatch.setattr(timing, "check_batch", narrow)
    grid = ("--grid", "proposals=20", "--grid", "short-side=96", "--json", tmp_path / "r.json")
    done = sweep(micro_bundle, data, *grid, "--grid", "batch=1,2")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    (skipped,) = report["skipped"]
    assert skipped["setting"].endswith("20 proposals, 96 px, batch 2")
    assert skipped["reason"] == "too many together"
    assert {e["proposals"] for e in report["settings"]} == {200, 20}
    done = sweep(micro_bundle, data, *grid, "--grid", "batch=2")
    assert done.exit_code == 1
    assert "nothing of the grid runs here: too many together" in done.output


def test_a_sweep_shows_that_it_goes_on(micro_bundle: Path, data: Path) -> None:
    done = sweep(micro_bundle, data, "--grid", "proposals=20", "--grid", "short-side=96",
                 "--grid", "batch=1", "--limit", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    for place, proposals in ((1, 200), (2, 20)):
        title = f"{place}/2 onnxruntime, {proposals} proposals, 96 px"
        assert f"{title}, AP: 2/2 images" in done.output
        assert f"{title}, timing batch 1: 1/1 runs" in done.output
    assert "0 s left" not in done.output


def test_interrupted_sweep_reports_what_it_has(
    micro_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Sweep._measure

    def stop(self: Sweep, *arguments: Any) -> None:
        if len(self.scored) >= 2:
            raise KeyboardInterrupt
        measure(self, *arguments)

    monkeypatch.setattr(Sweep, "_measure", stop)
    done = sweep(micro_bundle, data, "--grid", "batch=1,2", "--json", tmp_path / "r.json")
    assert done.exit_code == 130
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["settings"]) == 2
    assert not report["finished"]
    assert "interrupted" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Missing option '--data'"),
        (("--data", "shapes", "--max-loss", "-1"), 2, "-1.0 is not in the range"),
        (("--data", "shapes", "--no-record"), 2, "No such option '--no-record'"),
        (("--data", "shapes", "--batch", "2"), 2, "No such option '--batch'"),
        (("--data", "shapes", "--grid", "batch=0"), 2, "numbers from 1 on"),
        (("--data", "shapes", "--grid", "size=3"), 2, "expected proposals"),
        (
            ("--data", "shapes", "--grid", "proposals=201"),
            1,
            "--grid proposals: expected a whole number from 1 to 200, got 201",
        ),
        (
            ("--data", "shapes", "--grid", "short-side=99999"),
            1,
            "--short-side: expected a canvas of at most",
        ),
        (("--data", "nowhere"), 1, "nowhere"),
        (("--data", "{other}"), 1, "categories are not the bundle's"),
    ],
)
def test_wrong_use(
    micro_bundle: Path,
    data: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    (other / "images").symlink_to(data / "images")
    annotations = json.loads((data / "annotations" / "instances.json").read_text())
    annotations["categories"][0]["name"] = "zebra"
    (other / "annotations" / "instances.json").write_text(json.dumps(annotations))
    filled = [argument.format(other=other) for argument in arguments]
    done = run("sweep", micro_bundle, "--backend", "onnxruntime", *filled)
    assert done.exit_code == code, done.output
    assert words in " ".join(done.output.split())


def test_data_with_nothing_to_lose_is_refused(
    micro_bundle: Path, data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    (empty / "annotations").mkdir(parents=True)
    (empty / "images").symlink_to(data / "images")
    annotations = json.loads((data / "annotations" / "instances.json").read_text())
    annotations["annotations"] = []
    (empty / "annotations" / "instances.json").write_text(json.dumps(annotations))
    done = sweep(micro_bundle, empty)
    assert done.exit_code == 1
    assert "has no objects to score" in done.output


def test_picture_keeps_the_limit_in_sight_of_large_losses() -> None:
    def top(*losses: float) -> float:
        return top_of_losses(sweep_report(*losses))

    assert 0.5 < top(0.0, 40.0) < 10  # which is drawn on the edge
    assert 1.2 < top(0.0, 1.2) < 2
    assert top(0.0) > 0.5
