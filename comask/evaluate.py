"""Computes COCO's average precision (AP) of predictions against a data set.

AP and AR are fractions in 0..1, or -1 where the data has no such objects. faster-coco-eval computes them;
its numbers equal those of pycocotools (https://github.com/MiXaiLL76/faster_coco_eval).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comask.data.check_annotations import changed_annotations
from comask.data.problems import Kind
from comask.data.source import InstanceSource
from comask.errors import DataError
from comask.segmentation import read_segmentation
from comask.structures import Detections

TASKS = ("bbox", "segm")
TASK_NAMES = {"segm": "mask", "bbox": "box"}  # as shown to users, the more informative first
METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
COCO_DETECTIONS = 100  # COCO's own AP counts this number of detections per image
_RECALLED = (1, 10, COCO_DETECTIONS)  # detections per image that AR1, AR10 and AR100 count
_IOU_50, _IOU_75 = 0, 5  # indices among COCO's thresholds 0.50, 0.55, …, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoMetrics:
    """COCO's twelve numbers for boxes and masks.

    Attributes:
        values: `values[task][metric]`; the tasks are `bbox` and `segm`.
        per_class: `per_class[task][class name]`, the AP of each class that has objects.
        images: the number of images that were scored.
        detections: the number of detections in these images.
        max_detections: the number of detections per image that count, those of the highest scores; AR1,
            AR10 and AR100 count fewer.
        coco_ap: the AP of each task at COCO's 100 detections per image, if `max_detections` differs.
    """

    values: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float]]
    images: int
    detections: int
    max_detections: int = COCO_DETECTIONS
    coco_ap: dict[str, float] | None = None


def evaluate(
    source: InstanceSource, indices: list[int], predictions: Iterable[Detections]
) -> CocoMetrics:
    """Scores predictions on images of a source.

    Args:
        source: the data set with the ground truth.
        indices: the images to score, in the order of `predictions`.
        predictions: one per image, with the labels of `source`.

    Raises:
        DataError: when `indices` is empty.
    """
    results: list[dict[str, Any]] = []
    for index, detections in zip(indices, predictions, strict=True):
        results += coco_results(source, index, detections)
    return score(source, indices, results)


def coco_results(
    source: InstanceSource, index: int, detections: Detections
) -> list[dict[str, Any]]:
    """Returns COCO results of image `index` with the source's ids, not those of the training data."""
    categories = source.categories
    results = detections.to_coco(source.info(index).id)
    return [
        result | {"category_id": categories[label].id}
        for label, result in zip(detections.labels, results, strict=True)
    ]


def score(
    source: InstanceSource,
    indices: list[int],
    results: list[dict[str, Any]],
    *,
    detections: int = COCO_DETECTIONS,
) -> CocoMetrics:
    """Scores COCO results on the images `indices` of a source; `Truth` serves repeated scorings."""
    return Truth(source, indices).score(results, detections=detections)


@dataclass(eq=False)
class Truth:
    """The ground truth of some images, prepared once for any number of scorings.

    Images and categories get ids of their own, counted from 1, so that a data set's ids may be strings or
    exceed 2⁵³. Annotations that `comask.data.check` leaves out are left out here as well, so that every
    command scores the same objects.

    Attributes:
        source: the data set.
        indices: the images to score.

    Raises:
        DataError: when `indices` is empty.
    """

    source: InstanceSource
    indices: list[int]
    _parts: dict[tuple[int, ...], Truth] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.indices:
            raise DataError("no images to evaluate on")

    def of(self, indices: list[int]) -> Truth:
        """Returns the ground truth of some of the images, which is prepared once as well."""
        if indices == self.indices:
            return self
        return self._parts.setdefault(tuple(indices), Truth(self.source, indices))

    def score(
        self, results: list[dict[str, Any]], *, detections: int = COCO_DETECTIONS
    ) -> CocoMetrics:
        """Computes the metrics of COCO results; results of other images or categories are ignored.

        Args:
            results: objects with the data set's `image_id` and `category_id`, `bbox` (x, y, w, h in
                pixels), `score` and `segmentation` (RLE).
            detections: the model's number of detections per image. The limit is the largest of this
                number, COCO's 100 and the number of results of any one image.
        """
        numbered = self._numbered(results)
        most = max(Counter(result["image_id"] for result in numbered).values(), default=0)
        limit = max(COCO_DETECTIONS, detections, most)
        values: dict[str, dict[str, float]] = {}
        per_class: dict[str, dict[str, float]] = {}
        coco_ap: dict[str, float] = {}
        for task in TASKS:
            precision, recall = self._curves(numbered, task, limit)
            values[task] = _twelve(precision, recall)
            coco_ap[task] = _mean(precision[:, :, :, 0, len(_RECALLED) - 1])
            per_class[task] = {
                category.name: float(np.mean(precision[:, :, k, 0, -1]))
                for k, category in enumerate(self.source.categories)
                if (precision[:, :, k, 0, -1] > -1).any()
            }
        return CocoMetrics(
            values=values,
            per_class=per_class,
            images=len(self.indices),
            detections=len(results),
            max_detections=limit,
            coco_ap=coco_ap if limit != COCO_DETECTIONS else None,
        )

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """A COCO data set of the images under their new ids, with every segmentation as an RLE.

        Annotation ids are counted from 1, since COCO's evaluation uses 0 for "not matched".
        """
        findings: dict[Kind, list[str]] = {kind: [] for kind in Kind}
        changed = changed_annotations(self.source, self.indices, findings)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, index in enumerate(self.indices, start=1):
            info = self.source.info(index)
            images.append({"id": number, "height": info.height, "width": info.width})
            for annotation in changed.get(index, self.source.annotations(index)):
                mask = read_segmentation(annotation["segmentation"], info.height, info.width)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": self._category_numbers[annotation["category_id"]],
                        "bbox": annotation["bbox"],
                        "area": annotation.get("area", float(mask.area)),
                        "iscrowd": int(annotation.get("iscrowd") or 0),
                        "segmentation": mask.to_coco(),
                    }
                )
        categories = [
            {"id": self._category_numbers[c.id], "name": c.name} for c in self.source.categories
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    @cached_property
    def annotations(self) -> list[list[dict[str, Any]]]:
        """The annotations of each image, as in `dataset`."""
        by_image: list[list[dict[str, Any]]] = [[] for _ in self.indices]
        for annotation in self.dataset["annotations"]:
            by_image[annotation["image_id"] - 1].append(annotation)
        return by_image

    @cached_property
    def _category_numbers(self) -> dict[int | str, int]:
        return {c.id: number for number, c in enumerate(self.source.categories, start=1)}

    @cached_property
    def _image_numbers(self) -> dict[int | str, int]:
        return {self.source.info(index).id: n for n, index in enumerate(self.indices, start=1)}

    @cached_property
    def _truth(self) -> Any:
        return _coco(self.dataset, self.dataset["annotations"])

    def _numbered(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the results of known images and categories, under the new ids."""
        images, categories = self._image_numbers, self._category_numbers
        return [
            result | {"image_id": images[image], "category_id": categories[category]}
            for result in results
            if (image := result["image_id"]) in images
            and (category := result["category_id"]) in categories
        ]

    def _curves(
        self, results: list[dict[str, Any]], task: str, limit: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Computes precision [IoU, recall, class, area, limit] and recall [IoU, class, area, limit]."""
        from faster_coco_eval import COCOeval_faster
        from pycocotools import mask as coco_mask

        # The area, which makes an object small, medium or large, is the task's own, as in detectron2.
        entries = [
            result
            | {
                "id": number,
                "iscrowd": 0,
                "area": result["bbox"][2] * result["bbox"][3]
                if task == "bbox"
                else float(coco_mask.area(result["segmentation"])),
            }
            for number, result in enumerate(results, start=1)
        ]
        scorer = COCOeval_faster(self._truth, _coco(self.dataset, entries), task)
        scorer.params.maxDets = sorted({*_RECALLED, limit})
        scorer.evaluate()
        scorer.accumulate()
        return scorer.eval["precision"], scorer.eval["recall"]


def _coco(dataset: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """Returns faster-coco-eval's index of annotations; its own loader fails on an empty list."""
    from faster_coco_eval import COCO

    index = COCO()
    index.dataset = {**dataset, "annotations": annotations}
    index.createIndex()
    return index


def _twelve(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """Returns COCO's summary; AP and the ARs by size are those at the highest limit of detections."""
    average = precision[..., -1]  # [IoU, recall, class, area]
    numbers = {
        "AP": average[:, :, :, 0],
        "AP50": average[_IOU_50, :, :, 0],
        "AP75": average[_IOU_75, :, :, 0],
        **{f"AP{size}": average[:, :, :, area] for area, size in enumerate("sml", start=1)},
        **{f"AR{count}": recall[:, :, 0, place] for place, count in enumerate(_RECALLED)},
        **{f"AR{size}": recall[:, :, area, -1] for area, size in enumerate("sml", start=1)},
    }
    return {name: _mean(numbers[name]) for name in METRICS}


def ap_text(points: float, form: str = ".2f") -> str:
    """Formats AP points (0..100); NaN and negative values, which mean "no such objects", give `n/a`."""
    return f"{points:{form}}" if points >= 0 else "n/a"


def points_text(value: float, form: str = ".1f") -> str:
    """Formats a fraction (0..1) as AP points, as `ap_text` does."""
    return ap_text(100 * value, form)


def _mean(values: NDArray[np.float64]) -> float:
    """Returns the mean of the values above -1, or -1 if no value is."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0
