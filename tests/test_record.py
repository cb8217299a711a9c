"""The tables of a run: appended, torn, resumed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import CLASSES, metrics, write_run

from comask.errors import TrainingError
from comask.evaluate import METRICS, TASKS
from comask.training.record import RunRecord, Step, read_evaluations, read_rows


def test_rows_hold_what_was_added(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert float(rows[2]["loss_box"]) == 2 / 3
    assert float(rows[2]["loss"]) == 1 / 3 + 2 / 3
    assert (rows[2]["seconds"], rows[2]["data_seconds"]) == ("0.5", "0.125")
    rows = read_rows(tmp_path / "eval.csv")
    assert list(rows[0]) == ["step", "epoch", "stage", "task", *METRICS]
    assert [(row["step"], row["stage"], row["task"]) for row in rows] == [
        (step, stage, task)
        for step, stages in (("10", ["final"]), ("20", ["final", "first", "plain"]))
        for stage in stages
        for task in TASKS
    ]
    last = read_evaluations(tmp_path)[-1]
    assert (last.step, last.epoch) == (20, 1)
    assert last.values["final"]["bbox"]["AP"] == 0.5
    assert last.points("first", "segm") == pytest.approx(39)
    classes = [
        (row["step"], row["task"], row["class"]) for row in read_rows(tmp_path / "per_class.csv")
    ]
    assert classes == [("20", task, name) for task in TASKS for name in CLASSES[1:]]


@given(
    name=st.sampled_from(["metrics.csv", "eval.csv", "per_class.csv"]),
    where=st.floats(0, 1),
    keep=st.integers(0, 30),
)
def test_a_run_killed_anywhere_goes_on(name: str, where: float, keep: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_run(folder, 2)
        path = folder / name
        whole, content = read_rows(path), path.read_bytes()
        path.write_bytes(content[: round(where * len(content))])
        torn = read_rows(path)
        assert torn == whole[: len(torn)]
        if where == 1:
            assert torn == whole
        record = RunRecord(folder, keep_until=keep)
        kept = [row for row in torn if int(row["step"]) <= keep]
        assert read_rows(path) == kept
        assert not list(folder.glob(".*"))
        for step in (40, 41):
            record.add_step(Step(step=step, epoch=9, rate=0.1, losses={"mask": 0.5, "box": 0.25}))
            record.add_metrics(step, 9, {"final": metrics(0.5, 0.4)})
        rows = read_rows(path)
        if name != "per_class.csv":
            assert rows[: len(kept)] == kept
            assert [row["step"] for row in rows[len(kept) :: 1 if "m" in name else 2]] == [
                "40",
                "41",
            ]
        else:
            assert {row["step"] for row in rows} == {"41"}


def test_a_torn_evaluation_is_no_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    path = tmp_path / "eval.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    *_, last = read_evaluations(tmp_path)
    assert (last.step, list(last.values)) == (20, ["final", "first"])
    path.write_bytes(b"".join(lines[:-5]))
    assert [evaluation.step for evaluation in read_evaluations(tmp_path)] == [10]


def test_a_failing_resume_leaves_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        RunRecord(tmp_path, keep_until=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,split,lr,loss\n1,0,train,0.1,2.0\n")
    record = RunRecord(tmp_path, keep_until=1)
    with pytest.raises(
        TrainingError, match=r"metrics\.csv: has the columns step, epoch, .*--resume"
    ):
        record.add_step(Step(step=2, epoch=0, rate=0.1, losses={"mask": 1.0}))
    assert len(read_rows(tmp_path / "metrics.csv")) == 1


def test_what_does_not_exist_is_written_and_read_as_such(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    record.add_metrics(1, 0, {"final": metrics(-1.0, 0.25)})
    rows = read_rows(tmp_path / "eval.csv")
    assert {row["task"]: row["AP"] for row in rows} == {"bbox": "n/a", "segm": "0.25"}
    (last,) = read_evaluations(tmp_path)
    assert math.isnan(last.points("final", "bbox"))
    assert last.points("final", "segm") == 25
