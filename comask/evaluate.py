"""COCO average precision of predictions against a source, by pycocotools.

AP and AR are fractions in 0..1, or -1 where the data holds no such objects.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from comask.data.source import InstanceSource
from comask.errors import DataError
from comask.segmentation import read_segmentation
from comask.structures import Detections

TASKS = ("bbox", "segm")
METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoMetrics:
    """COCO's twelve numbers of both tasks.

    Attributes:
        values: `values[task][metric]`, tasks being `bbox` and `segm`.
        per_class: `per_class[task][class name]`, AP of each class that has objects.
        images: how many images were scored.
        detections: how many detections they hold.
    """

    values: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float]]
    images: int
    detections: int


def evaluate(
    source: InstanceSource, indices: list[int], predictions: Iterable[Detections]
) -> CocoMetrics:
    """Scores predictions on images of a source.

    Args:
        source: with the ground truth.
        indices: which images, in the order of `predictions`.
        predictions: one an image; their labels are those of `source`.

    Raises:
        DataError: when there are no images to score.
    """
    results: list[dict[str, Any]] = []
    for index, found in zip(indices, predictions, strict=True):
        results += coco_results(source, index, found)
    return score(source, indices, results)


def coco_results(source: InstanceSource, index: int, found: Detections) -> list[dict[str, Any]]:
    """COCO results of image `index` with the source's ids, whatever ids the model was trained with."""
    categories = source.categories
    return [
        result | {"category_id": categories[label].id}
        for label, result in zip(found.labels, found.to_coco(source.info(index).id), strict=True)
    ]


def score(source: InstanceSource, indices: list[int], results: list[dict[str, Any]]) -> CocoMetrics:
    """Scores COCO results (as `coco_results` gives them) on the images `indices` of a source.

    Raises:
        DataError: when there are no images to score.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not indices:
        raise DataError("no images to evaluate on")
    categories = source.categories
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = COCO()
        truth.dataset = ground_truth(source, indices)
        truth.createIndex()
        values, per_class = {}, {}
        for task in TASKS:
            scorer = COCOeval(truth, _load_results(truth, results, task), task)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            values[task] = dict(zip(METRICS, map(float, scorer.stats), strict=True))
            # [IoU thresholds, recall, class, area range, detections an image]
            precision = scorer.eval["precision"][:, :, :, 0, -1]
            per_class[task] = {
                category.name: float(np.mean(precision[:, :, k]))
                for k, category in enumerate(categories)
                if (precision[:, :, k] > -1).any()
            }
    return CocoMetrics(
        values=values, per_class=per_class, images=len(indices), detections=len(results)
    )


def ground_truth(source: InstanceSource, indices: list[int]) -> dict[str, Any]:
    """A COCO data set of those images, every segmentation as RLE of the image's size.

    Annotation ids are counted anew from 1: pycocotools takes an id of 0 for "not matched".
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in indices:
        info = source.info(index)
        images.append({"id": info.id, "height": info.height, "width": info.width})
        for annotation in source.annotations(index):
            mask = read_segmentation(annotation["segmentation"], info.height, info.width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": info.id,
                    "category_id": annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "area": annotation.get("area", float(mask.area)),
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                    "segmentation": mask.to_coco(),
                }
            )
    categories = [{"id": c.id, "name": c.name} for c in source.categories]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _load_results(truth: Any, results: list[dict[str, Any]], task: str) -> Any:
    """`COCO.loadRes`, which fails on an empty list and takes the box's area for masks, too.

    The area decides between small, medium and large; detectron2 also gives each task its own.
    """
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO

    found = COCO()
    annotations = [
        result
        | {
            "id": i,
            "area": result["bbox"][2] * result["bbox"][3]
            if task == "bbox"
            else float(coco_mask.area(result["segmentation"])),
            "iscrowd": 0,
        }
        for i, result in enumerate(results, start=1)
    ]
    found.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": annotations,
    }
    found.createIndex()
    return found
