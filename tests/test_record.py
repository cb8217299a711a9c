"""What a run shows: its tables, curves, pictures and report."""

from __future__ import annotations

import base64
import dataclasses
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from comask.config import Config, ModelConfig
from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo
from comask.errors import ConfigError, TrainingError
from comask.evaluate import METRICS, TASKS, CocoMetrics
from comask.masks import mask_from_segmentation
from comask.structures import Detections
from comask.training import curves
from comask.training.curves import draw_curves
from comask.training.pictures import picture_grid, true_detections
from comask.training.record import RunRecord, read_evaluations, read_rows
from comask.training.report import write_report

CLASSES = ("cat", 'a,"b"\nc', "<b>&")
CATEGORIES = tuple(Category(id=i, name=name) for i, name in enumerate(CLASSES, start=1))


def metrics(box: float, mask: float) -> CocoMetrics:
    """Numbers of which AP is as given; the class `cat` has no objects."""
    values = {
        task: {name: ap if name == "AP" else ap / 2 for name in METRICS}
        for task, ap in zip(TASKS, (box, mask), strict=True)
    }
    per_class = {task: {name: values[task]["AP"] for name in CLASSES[1:]} for task in TASKS}
    return CocoMetrics(values=values, per_class=per_class, images=2, detections=3)


def write_run(
    folder: Path, evaluations: int, *, box_gain: float = 0.02, mask_gain: float = 0.01
) -> None:
    """Ten steps an evaluation, at least ten; box AP ends at 0.5 and mask AP at 0.4."""
    record = RunRecord(folder, keep_until=0)
    for step in range(1, 10 * max(1, evaluations) + 1):
        losses = {"mask": 1 / step, "box": 2 / step}
        record.add_losses(step, step // 20, 0.1, losses, seconds=0.5, data_seconds=0.125)
        if evaluations and step % 10 == 0:
            rise = step / evaluations / 10
            final = metrics(0.5 * rise, 0.4 * rise)
            first = metrics(0.5 * rise - box_gain, 0.4 * rise - mask_gain)
            record.add_metrics(step, step // 20, final, first)
    record.close()


# ---- tables ----


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
        for step in ("10", "20")
        for stage in ("final", "first")
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
            record.add_losses(step, 9, 0.1, {"mask": 0.5, "box": 0.25})
            record.add_metrics(step, 9, metrics(0.5, 0.4), metrics(0.5, 0.4))
        rows = read_rows(path)
        if name != "per_class.csv":
            assert rows[: len(kept)] == kept
            assert [row["step"] for row in rows[len(kept) :: 1 if "m" in name else 4]] == [
                "40",
                "41",
            ]
        else:
            assert {row["step"] for row in rows} == {"41"}


def test_a_torn_evaluation_is_no_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    path = tmp_path / "eval.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
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
        record.add_losses(2, 0, 0.1, {"mask": 1.0})
    assert len(read_rows(tmp_path / "metrics.csv")) == 1


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar: object) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append(("closed",))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    record = RunRecord(tmp_path, keep_until=3, tensorboard=True)
    record.add_losses(4, 0, 0.1, {"mask": 2.0, "box": 1.0})
    record.add_metrics(4, 0, metrics(0.5, 0.4), metrics(-1.0, 0.3))
    record.close()
    assert calls == [
        (str(tmp_path / "tensorboard"), 4),
        ("train/lr", 0.1, 4), ("train/loss", 3.0, 4),
        ("train/loss_mask", 2.0, 4), ("train/loss_box", 1.0, 4),
        ("validation/bbox_AP_final", 0.5, 4), ("validation/segm_AP_final", 0.4, 4),
        ("validation/segm_AP_first", 0.3, 4),
        ("closed",),
    ]  # fmt: skip


def test_missing_tensorboard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    with pytest.raises(ConfigError, match="pip install tensorboard, or leave the setting out"):
        RunRecord(tmp_path, keep_until=0, tensorboard=True)


# ---- curves ----


@pytest.mark.parametrize("evaluations", [0, 1, 12])
def test_curves_are_drawn(tmp_path: Path, evaluations: int) -> None:
    write_run(tmp_path, evaluations)
    written = draw_curves(tmp_path)
    drawn = ["losses.png", "ap.png", "collaboration.png"] if evaluations else ["losses.png"]
    assert [path.name for path in written] == drawn
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        # lines in colour, not only axes and text
        assert (np.ptp(pixels.astype(int), axis=1) > 60).sum() > 50, path
    assert draw_curves(tmp_path / "nowhere") == []


def test_curves_without_objects_are_drawn(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    record.add_metrics(1, 0, metrics(-1, -1), metrics(-1, -1))
    assert len(draw_curves(tmp_path)) == 2


def test_precision_axis_shows_differences(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, keep_until=0)
    for step in (1, 2):
        record.add_metrics(step, 0, metrics(0.50 + step / 100, 0.50), metrics(0.50, 0.50))
    figure = curves._collaboration(read_evaluations(tmp_path))
    masks, boxes, mask_gain, box_gain = figure.axes
    assert masks.get_ylim() == (49, 51)
    assert boxes.get_ylim() == (49, 53)
    assert max(mask_gain.get_ylim()) >= 1  # no difference looks like none
    assert max(box_gain.get_ylim()) > 2


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 50))
def test_smoothing_is_a_running_mean(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(curves._smoothed(np.array(values), window), expected, atol=1e-9)


# ---- pictures ----


class OneImage:
    """A source of one gray image, of any size and annotations."""

    categories = CATEGORIES

    def __init__(self, height: int, width: int, name: str, *annotations: dict[str, Any]) -> None:
        self._info = ImageInfo(id=7, file_name=name, height=height, width=width)
        self._annotations = list(annotations)

    def __len__(self) -> int:
        return 1

    def info(self, index: int) -> ImageInfo:
        return self._info

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((self._info.height, self._info.width, 3), 128, np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return self._annotations


def annotation(*bbox: float, crowd: int = 0) -> dict[str, Any]:
    x, y, w, h = bbox
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"bbox": list(bbox), "category_id": 3, "iscrowd": crowd, "segmentation": [outline]}


def nothing(height: int, width: int) -> Detections:
    return true_detections(OneImage(height, width, "x"), 0)


def test_true_masks_are_the_annotated_ones() -> None:
    source, large = ShapesSource(num_images=40, seed=5), 0
    for index in range(len(source)):
        info = source.info(index)
        objects = [a for a in source.annotations(index) if not a["iscrowd"]]
        found = true_detections(source, index)
        assert [source.categories[label].id for label in found.labels] == [
            a["category_id"] for a in objects
        ]
        for entry, mask in zip(objects, found.masks, strict=True):
            truth = mask_from_segmentation(entry["segmentation"], info.height, info.width)
            iou = (mask & truth).sum() / (mask | truth).sum()
            if max(entry["bbox"][2:]) > 20:
                large += 1
                assert iou > 0.9, (index, entry["id"])
    assert large > 40


def test_true_boxes_keep_to_the_image() -> None:
    source = OneImage(
        400, 600, "x",
        annotation(-10.5, 20.25, 500, 300), annotation(590, 390, 50, 50),
        annotation(10, 10, 0, 5), annotation(700, 10, 5, 5), annotation(1, 1, 9, 9, crowd=1),
    )  # fmt: skip
    found = true_detections(source, 0)
    assert found.boxes_xyxy.tolist() == [[0, 20, 490, 321], [590, 390, 600, 400]]
    assert found.labels.tolist() == [2, 2]
    assert found.masks[0].sum() == pytest.approx(489.5 * 300, rel=0.02)


def test_grid_of_shapes(tmp_path: Path) -> None:
    source = ShapesSource(num_images=40, seed=3)
    empty = next(i for i in range(40) if not source.annotations(i))
    indices = [0, 1, empty, 2, 3]
    found = [true_detections(source, i) for i in indices]
    found[0] = found[0][:0]  # nothing found where there is something
    path = tmp_path / "grid.png"
    picture_grid(source, indices, found, path)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * (2 * (384 + 8) + 8)  # two pairs of 96 or 128 pixels, enlarged
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000

    # The same objects on both sides look the same; weak predictions are not drawn.
    def pair(scores: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        again = dataclasses.replace(found[1], scores=np.full_like(found[1].scores, scores))
        picture_grid(source, [1], [again], path, threshold=0.5)
        sides = np.asarray(Image.open(path))[48:]
        return sides[:, 8 : 8 + 384], sides[:, 400 : 400 + 384]

    true, predicted = pair(1.0)
    assert (true == predicted).all()
    true, predicted = pair(0.49)
    assert (true != predicted).any()


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(480, 640, (480, 640)), (900, 1600, (360, 640)), (2000, 500, (640, 160)), (1, 1, (320, 320)),
     (300, 319, (600, 638)), (600, 100, (600, 100)), (3000, 2, (640, 1))],
)  # fmt: skip
def test_tiles_fit(tmp_path: Path, height: int, width: int, tile: tuple[int, int]) -> None:
    name = "a very long name / of an image\n" * 20
    source = OneImage(height, width, name, annotation(0, 0, width, height))
    picture_grid(source, [0], [nothing(height, width)], tmp_path / "grid.png")
    image = Image.open(tmp_path / "grid.png")
    assert image.size == (2 * (tile[1] + 8) + 8, 2 * 24 + tile[0] + 8)


def test_no_images_give_no_grid(tmp_path: Path) -> None:
    picture_grid(ShapesSource(num_images=1, seed=0), [], [], tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="shorter"):
        picture_grid(ShapesSource(num_images=1, seed=0), [0], [], tmp_path / "grid.png")


# ---- report ----


class Page(HTMLParser):
    """The images and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.source, self.text = path.read_text(), ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name == "src"]
        self.links += [value or "" for name, value in attributes if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def report(folder: Path, **model: Any) -> Page:
    config = dataclasses.asdict(Config(model=ModelConfig(num_classes=3, **model)))
    return Page(write_report(folder, config=config, categories=CATEGORIES, title="run <i>"))


def test_report_holds_everything(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    draw_curves(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for step in (10, 999990, 1000000):
        Image.new("RGB", (4, 4), (step % 255, 0, 0)).save(pictures / f"step-{step:06d}.png")
    page = report(tmp_path)
    shown = [tmp_path / name for name in ("collaboration.png", "ap.png", "losses.png")]
    shown.append(pictures / "step-1000000.png")
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    assert [base64.b64decode(source.removeprefix(prefix)) for source in page.sources] == [
        path.read_bytes() for path in shown
    ]
    assert page.links == ["pictures/step-999990.png", "pictures/step-000010.png"]
    assert all((tmp_path / link).exists() for link in page.links)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not page.tags & {"b", "i", "script", "link"}
    for text in ("<b>&", "run <i>", "mask 40.0, box 50.0", "25.0 %", "msfem_branches", "AR100"):
        assert text in page.text, text
    assert "Yes." in page.text
    assert "The weighted average raised box AP by 2.00 points, from 48.00 to 50.00." in page.text
    assert "refined boxes were better in 3 of 3 evaluations" in page.text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("box_gain", "mask_gain", "verdict"),
    [
        (
            -0.02,
            -0.01,
            "No: it does harm. The weighted average LOWERED box AP by 2.00 points, from 52.00",
        ),
        (-0.02, 0.01, "In part. The weighted average LOWERED box AP by 2.00 points"),
        (0.0, -0.01, "No: it does harm. The weighted average hardly changed box AP, from 50.00"),
        (0.0, 0.0, "No: it makes no difference."),
        (0.02, 0.0, "In part."),
    ],
)
def test_report_is_honest(tmp_path: Path, box_gain: float, mask_gain: float, verdict: str) -> None:
    write_run(tmp_path, 1, box_gain=box_gain, mask_gain=mask_gain)
    assert verdict in report(tmp_path).text


def test_report_names_what_refines(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    assert (
        "plain average (model.collaboration=uniform)"
        in report(tmp_path, collaboration="uniform").text
    )


def test_report_of_a_young_run(tmp_path: Path) -> None:
    assert "No step yet." in report(tmp_path).text
    write_run(tmp_path, 0)
    page = report(tmp_path)
    assert "No evaluation yet." in page.text
    assert "last step" in page.text
    assert not page.sources
    record = RunRecord(tmp_path, keep_until=10)
    record.add_metrics(10, 0, metrics(-1, -1), metrics(-1, -1))
    assert "It cannot be told: the validation data holds no objects." in report(tmp_path).text
