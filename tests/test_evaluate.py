"""AP: perfect and empty predictions, parity with pycocotools, ids of any kind, full images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from comask.data.shapes import ShapesSource
from comask.data.source import Category, ImageInfo
from comask.errors import DataError
from comask.evaluate import COCO_DETECTIONS, METRICS, Truth, evaluate, points_text, score
from comask.segmentation import read_segmentation
from comask.structures import Detections


def predictions(source: ShapesSource, indices: list[int], noise: float) -> list[Detections]:
    """The ground truth as detections: masks cut from the bitmaps, boxes off by `noise` pixels."""
    import cv2

    rng = np.random.default_rng(0)
    labels_of = {c.id: label for label, c in enumerate(source.categories)}
    found = []
    for index in indices:
        info = source.info(index)
        boxes, labels, masks = [], [], []
        for annotation in source.annotations(index):
            if annotation["iscrowd"]:
                continue
            x, y, w, h = (int(v) for v in annotation["bbox"])
            bitmap = read_segmentation(annotation["segmentation"], info.height, info.width).bitmap()
            crop = bitmap[y : y + h, x : x + w].astype(np.float32)
            masks.append(cv2.resize(crop, (28, 28), interpolation=cv2.INTER_LINEAR))
            boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, noise, 4))
            labels.append(labels_of[annotation["category_id"]])
        found.append(
            Detections(
                boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
                scores=rng.random(len(boxes)).astype(np.float32),
                labels=np.array(labels, np.int64),
                mask_probs=np.array(masks, np.float32).reshape(-1, 28, 28),
                image_size=(info.height, info.width),
            )
        )
    return found


class Named:
    """A source whose ids are others than those of the one behind it."""

    def __init__(
        self,
        source: ShapesSource,
        image_id: Callable[[int], Any],
        category_id: Callable[[int], Any],
        annotation_id: Callable[[int], Any],
    ) -> None:
        self._source, self._image_id, self._category_id = source, image_id, category_id
        self._annotation_id = annotation_id
        self.categories = tuple(
            Category(id=category_id(c.id), name=c.name) for c in source.categories
        )

    def __len__(self) -> int:
        return len(self._source)

    def info(self, index: int) -> ImageInfo:
        info = self._source.info(index)
        return ImageInfo(
            id=self._image_id(info.id),
            file_name=info.file_name,
            height=info.height,
            width=info.width,
        )

    def image(self, index: int) -> NDArray[np.uint8]:
        return self._source.image(index)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return [
            annotation
            | {
                "id": self._annotation_id(annotation["id"]),
                "image_id": self._image_id(annotation["image_id"]),
                "category_id": self._category_id(annotation["category_id"]),
            }
            for annotation in self._source.annotations(index)
        ]


def plain(number: int) -> int:
    return number


def test_perfect_boxes_score_one() -> None:
    source, indices = ShapesSource(num_images=30, seed=1), list(range(30))
    metrics = evaluate(source, indices, predictions(source, indices, noise=0.0))
    assert metrics.values["bbox"]["AP"] == pytest.approx(1.0)
    assert metrics.values["segm"]["AP"] > 0.8  # 28×28 cells do not hold every corner
    assert metrics.per_class["bbox"].keys() == {c.name for c in source.categories}
    assert metrics.images == 30
    assert metrics.max_detections == COCO_DETECTIONS
    assert metrics.coco_ap is None


def pycocotools_stats(
    folder: Path, truth: dict[str, Any], rows: list[dict[str, Any]], task: str
) -> list[float]:
    """COCO's twelve numbers by the original program, from files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (folder / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(folder / "truth.json"))
    # loadRes takes the box's area where there is a box; masks shall be sorted by their own
    without = "segmentation" if task == "bbox" else "bbox"
    kept = [{key: value for key, value in row.items() if key != without} for row in rows]
    (folder / "found.json").write_text(json.dumps(kept))
    scorer = COCOeval(coco, coco.loadRes(str(folder / "found.json")), task)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return [float(number) for number in scorer.stats]


def test_equals_pycocotools_on_files(tmp_path: Path) -> None:
    source, indices = ShapesSource(num_images=40, seed=2), list(range(40))
    found = predictions(source, indices, noise=2.0)
    metrics = evaluate(source, indices, found)
    truth = Truth(source, indices).dataset
    rows = [row for i, d in zip(indices, found, strict=True) for row in d.to_coco(i + 1)]
    for task in ("bbox", "segm"):
        stats = pycocotools_stats(tmp_path, truth, rows, task)
        assert list(metrics.values[task].values()) == pytest.approx(stats)
        assert tuple(metrics.values[task]) == METRICS
        assert 0.1 < metrics.values[task]["AP"] < 0.9


def test_crowds_count_as_pycocotools_counts_them(tmp_path: Path) -> None:
    source, indices = ShapesSource(num_images=20, seed=3), list(range(20))
    rows = [
        row
        for i, d in zip(indices, predictions(source, indices, noise=2.0), strict=True)
        for row in d.to_coco(i + 1)
    ]

    class Crowded(Named):
        def annotations(self, index: int) -> list[dict[str, Any]]:
            return [
                annotation | {"iscrowd": annotation["id"] % 3 == 0}
                for annotation in super().annotations(index)
            ]

    crowded = Crowded(source, plain, plain, plain)
    metrics = score(crowded, indices, rows)
    truth = Truth(crowded, indices).dataset
    assert {a["iscrowd"] for a in truth["annotations"]} == {0, 1}
    for task in ("bbox", "segm"):
        stats = pycocotools_stats(tmp_path, truth, rows, task)
        assert list(metrics.values[task].values()) == pytest.approx(stats)


# Each turns the numbers of a source into other ids; f64 holds integers up to 2**53 alone.
IDS: dict[str, Callable[[int], Any]] = {
    "beyond f64": lambda n: 2**53 + n,
    "unsigned": lambda n: 2**64 - 1 - n,
    "negative": lambda n: -n,
    "0 among them": lambda n: n - 1,
    "strings": lambda n: f"{n:032x}",
    "both": lambda n: n if n % 2 else str(n),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_are_names(kind: str) -> None:
    source, indices = ShapesSource(num_images=12, seed=4), list(range(12))
    found = predictions(source, indices, noise=2.0)
    missed = [d if i % 3 else d[:0] for i, d in enumerate(found)]  # so that a lost image would show
    expected = evaluate(source, indices, missed)
    rename = IDS[kind]
    for ids in ((rename, plain, plain), (plain, rename, plain), (plain, plain, rename)):
        assert evaluate(Named(source, *ids), indices, missed) == expected
    assert 0.1 < expected.values["segm"]["AP"] < 0.9


def test_results_of_unknown_ids_match_nothing() -> None:
    source, indices = ShapesSource(num_images=5, seed=4), list(range(5))
    found = [d.to_coco(i + 1) for i, d in enumerate(predictions(source, indices, noise=0))]
    rows = [row for image in found for row in image]
    strangers = [row | {"image_id": "1"} for row in rows]  # not the image 1
    strangers += [row | {"category_id": 99} for row in rows]
    assert score(source, indices, rows + strangers).values == score(source, indices, rows).values


class Full:
    """One image with `count` squares of one class, as many as are found."""

    categories = (Category(id=1, name="square"),)

    def __init__(self, count: int, side: int = 8) -> None:
        self._count, self._columns = count, math.isqrt(count) + 1
        self._side, self.size = side, (math.isqrt(count) + 1) * 2 * side

    def __len__(self) -> int:
        return 1

    def info(self, index: int) -> ImageInfo:
        return ImageInfo(id=7, file_name="full.png", height=self.size, width=self.size)

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.zeros((self.size, self.size, 3), np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        found = []
        for number in range(self._count):
            x, y = (2 * self._side * place for place in divmod(number, self._columns))
            s = self._side
            found.append(
                {"id": number + 1, "image_id": 7, "category_id": 1, "iscrowd": 0,
                 "bbox": [x, y, s, s], "area": s * s,
                 "segmentation": [[x, y, x + s, y, x + s, y + s, x, y + s]]}
            )  # fmt: skip
        return found

    def results(self, count: int) -> list[dict[str, Any]]:
        """So many of the objects, found exactly."""
        return [
            {"image_id": 7, "category_id": 1, "bbox": a["bbox"], "score": 1 - a["id"] / 1000,
             "segmentation": read_segmentation(a["segmentation"], self.size, self.size).to_coco()}
            for a in self.annotations(0)[:count]
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("objects", "found", "detections", "limit"),
    [(90, 90, 100, 100), (100, 100, 16, 100), (300, 300, 100, 300), (300, 300, 300, 300),
     (150, 120, 300, 300), (300, 101, 100, 101)],
)  # fmt: skip
def test_as_many_detections_count_as_there_are(
    objects: int, found: int, detections: int, limit: int
) -> None:
    source = Full(objects)
    metrics = score(source, [0], source.results(found), detections=detections)
    # AP of found / objects at perfect precision: recall thresholds 0, 0.01, … that are reached
    expected = (math.floor(100 * found / objects + 1e-9) + 1) / 101
    assert metrics.max_detections == limit
    for task in ("bbox", "segm"):
        assert metrics.values[task]["AP"] == pytest.approx(expected, abs=1e-9)
        assert metrics.values[task]["AR100"] == pytest.approx(min(found, 100) / objects)
        if limit == COCO_DETECTIONS:
            assert metrics.coco_ap is None
        else:
            assert metrics.coco_ap is not None
            reached = math.floor(100 * min(found, 100) / objects + 1e-9) + 1
            assert metrics.coco_ap[task] == pytest.approx(reached / 101, abs=1e-9)


def test_coco_s_own_ap_beside_it_is_pycocotools(tmp_path: Path) -> None:
    source = Full(140)
    rows = source.results(130)
    metrics = score(source, [0], rows)
    truth = Truth(source, [0]).dataset
    assert metrics.coco_ap is not None
    for task in ("bbox", "segm"):
        numbered = [row | {"image_id": 1} for row in rows]
        stats = pycocotools_stats(tmp_path, truth, numbered, task)
        assert metrics.coco_ap[task] == pytest.approx(stats[0])
        assert metrics.values[task]["AP"] > stats[0]


def test_nothing_found_scores_zero_and_annotation_id_zero_counts() -> None:
    source = ShapesSource(num_images=10, seed=1)
    indices = list(range(10))
    nothing = [d[:0] for d in predictions(source, indices, noise=0.0)]
    assert evaluate(source, indices, nothing).values["segm"]["AP"] == 0
    assert min(a["id"] for a in Truth(source, indices).dataset["annotations"]) == 1


def test_one_truth_scores_any_number_of_results_alike() -> None:
    source, indices = ShapesSource(num_images=8, seed=6), list(range(8))
    truth = Truth(source, indices)
    rows = [
        row
        for i, d in zip(indices, predictions(source, indices, noise=1.0), strict=True)
        for row in d.to_coco(i + 1)
    ]
    first = truth.score(rows)
    assert truth.score([]).values["bbox"]["AP"] == 0
    assert truth.score(rows) == first == score(source, indices, rows)
    some = truth.of(indices[:3])
    assert some.score(rows) == score(source, indices[:3], rows)
    assert truth.of(indices) is truth


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(ShapesSource(num_images=3, seed=0), [], [])


@given(st.floats(0, 1))
def test_points_are_percent_and_what_does_not_exist_is_said(value: float) -> None:
    assert points_text(value) == f"{100 * value:.1f}"
    assert points_text(-1.0) == "n/a"
