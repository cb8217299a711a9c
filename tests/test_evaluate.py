"""AP: perfect and empty predictions, and parity with pycocotools run by hand on files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from comask.data.shapes import ShapesSource
from comask.errors import DataError
from comask.evaluate import METRICS, evaluate, ground_truth
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


def test_perfect_boxes_score_one() -> None:
    source, indices = ShapesSource(num_images=30, seed=1), list(range(30))
    metrics = evaluate(source, indices, predictions(source, indices, noise=0.0))
    assert metrics.values["bbox"]["AP"] == pytest.approx(1.0)
    assert metrics.values["segm"]["AP"] > 0.8  # 28×28 cells do not hold every corner
    assert metrics.per_class["bbox"].keys() == {c.name for c in source.categories}
    assert metrics.images == 30


def test_equals_pycocotools_on_files(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source, indices = ShapesSource(num_images=40, seed=2), list(range(40))
    found = predictions(source, indices, noise=2.0)
    metrics = evaluate(source, indices, found)

    truth = ground_truth(source, indices)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    rows = [row for i, d in zip(indices, found, strict=True) for row in d.to_coco(i + 1)]
    coco = COCO(str(tmp_path / "truth.json"))
    for task in ("bbox", "segm"):
        # loadRes takes the box's area where there is a box; masks shall be sorted by their own
        kept = rows if task == "bbox" else [{**row, "bbox": None} for row in rows]
        kept = [{k: v for k, v in row.items() if v is not None} for row in kept]
        (tmp_path / "found.json").write_text(json.dumps(kept))
        scorer = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), task)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        assert list(metrics.values[task].values()) == pytest.approx(scorer.stats.tolist())
        assert tuple(metrics.values[task]) == METRICS
        assert 0.1 < metrics.values[task]["AP"] < 0.9


def test_nothing_found_scores_zero_and_annotation_id_zero_counts() -> None:
    source = ShapesSource(num_images=10, seed=1)
    indices = list(range(10))
    nothing = [d[:0] for d in predictions(source, indices, noise=0.0)]
    assert evaluate(source, indices, nothing).values["segm"]["AP"] == 0
    assert min(a["id"] for a in ground_truth(source, indices)["annotations"]) == 1


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(ShapesSource(num_images=3, seed=0), [], [])
