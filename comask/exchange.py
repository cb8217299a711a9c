"""Takes detections from supervision, and writes those of a folder of images for other tools.

`write_coco_dataset` is for FiftyOne, CVAT and whatever else reads COCO data sets; `comask.label_studio`
writes tasks for Label Studio.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comask.data.source import Category, Id, ImageInfo
from comask.errors import DataError
from comask.files import whole_file
from comask.masks import run_length_mask
from comask.segmentation import RunLengthMask, read_segmentation
from comask.structures import Detections

if TYPE_CHECKING:
    import supervision

__all__ = ["FolderResults", "ImageInfo", "from_supervision", "write_coco_dataset"]


def from_supervision(
    found: supervision.Detections,
    image_size: tuple[int, int] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[Id] | None = None,
) -> Detections:
    """Converts a `supervision.Detections` that has masks; the reverse of `Detections.to_supervision`.

    The masks keep every pixel, as `run_length_masks`, since there are no probabilities. Track ids and
    `data` are not kept.

    Args:
        found: the detections of one image; `mask` is an array [N, H, W] or a `CompactMask`. Scores are 1
            where it has no `confidence`, labels are 0 where it has no `class_id`.
        image_size: (height, width) in pixels; only needed where nothing was found and `mask` is None.
        class_names: the name of each label, or None if unknown.
        category_ids: the data set's id of each label; None stands for label + 1.

    Raises:
        DataError: when detections have no masks, or `image_size` differs from theirs.
        ValueError: when a `class_id` has no name in `class_names`.
    """
    bitmaps, count = found.mask, len(found)
    size = image_size
    if bitmaps is not None:
        size = int(bitmaps.shape[1]), int(bitmaps.shape[2])
    if size is None or (bitmaps is None and count):
        raise DataError(
            f"supervision.Detections has {count} boxes and no masks: expected a mask for each box, or, "
            f"where nothing was found, image_size"
        )
    if image_size is not None and image_size != size:
        raise DataError(f"image_size: expected {size}, that of the masks, got {image_size}")
    scores = np.ones(count) if found.confidence is None else np.asarray(found.confidence)
    labels = np.zeros(count) if found.class_id is None else np.asarray(found.class_id)
    order = np.argsort(-scores, kind="stable")
    return Detections(
        boxes_xyxy=np.asarray(found.xyxy, np.float32)[order],
        scores=scores[order].astype(np.float32),
        labels=labels[order].astype(np.int64),
        mask_probs=np.zeros((count, 0, 0), np.float32),
        image_size=size,
        class_names=None if class_names is None else tuple(class_names),
        category_ids=None if category_ids is None else tuple(category_ids),
        # One bitmap at a time: all of a `CompactMask` would take N whole images.
        run_length_masks=tuple(
            run_length_mask(0, 0, np.asarray(bitmaps[index], np.bool_), size) for index in order
        ),
    )


class Instance(NamedTuple):
    """A detection as an annotation; `label` counts from 0, `score` is in 0..1."""

    label: int
    score: float
    mask: RunLengthMask


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderResults:
    """What was found in a folder of images.

    Attributes:
        folder: an absolute path, below which all images lie.
        categories: the classes, in label order.
        found: each image with its COCO results. The image's id is an integer, its `file_name` the path
            below `folder`. Writers take one image at a time, so that a generator needs little memory.
    """

    folder: Path
    categories: Sequence[Category]
    found: Iterable[tuple[ImageInfo, Sequence[Mapping[str, Any]]]]

    @classmethod
    def of(
        cls,
        images: Sequence[ImageInfo],
        results: Iterable[Mapping[str, Any]],
        categories: Sequence[Category],
        *,
        threshold: float | Sequence[float] = 0.0,
    ) -> FolderResults:
        """Sorts COCO results by image, as those of `detections.json`.

        Args:
            images: the images, as those of `images.json`; each `file_name` is a path, absolute or from
                the current folder. They are numbered from 1 on if an id is no integer.
            results: COCO results: `image_id`, `category_id`, `segmentation` and `score`.
            categories: the classes, in label order.
            threshold: the lowest score that is kept, of all classes or of each label.

        Returns:
            The results, with the deepest folder that holds all images.

        Raises:
            DataError: when there are no images, or a result is of none of them or of none of the
                categories.
        """
        if not images:
            raise DataError("there are no images, so there is nothing to write for other tools")
        paths = [os.path.abspath(image.file_name) for image in images]
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        labels = {category.id: label for label, category in enumerate(categories)}
        # in f32, as scores are: else 0.7 from the network would be lower than a threshold of 0.7
        limits = np.broadcast_to(np.asarray(threshold, np.float32), len(labels))
        by_image: dict[Id, list[Mapping[str, Any]]] = {image.id: [] for image in images}
        for result in results:
            if result["image_id"] not in by_image:
                raise DataError(
                    f"a result is of the image {result['image_id']!r}, which is unknown"
                )
            if np.float32(result.get("score", 1.0)) >= limits[_label(result, labels)]:
                by_image[result["image_id"]].append(result)
        numbered = not all(isinstance(image.id, int) for image in images)
        found = [
            (
                replace(
                    image,
                    id=number if numbered else image.id,
                    file_name=Path(path).relative_to(folder).as_posix(),
                ),
                by_image[image.id],
            )
            for number, (image, path) in enumerate(zip(images, paths, strict=True), 1)
        ]
        return cls(folder=Path(folder), categories=categories, found=found)

    def instances(self, image: ImageInfo, results: Sequence[Mapping[str, Any]]) -> list[Instance]:
        """Returns the results of one image that have a mask; those without a pixel are left out.

        A result without a score has a score of 1.

        Raises:
            DataError: when a category is unknown or a segmentation cannot be used.
        """
        labels = {category.id: label for label, category in enumerate(self.categories)}
        instances = []
        for result in results:
            label = _label(result, labels)
            mask = read_segmentation(result["segmentation"], image.height, image.width)
            if mask.area:
                instances.append(Instance(label, float(result.get("score", 1.0)), mask))
        return instances


def _label(result: Mapping[str, Any], labels: Mapping[Id, int]) -> int:
    if result["category_id"] not in labels:
        raise DataError(
            f"a result of the image {result['image_id']!r} has the category "
            f"{result['category_id']!r}; expected one of {', '.join(map(repr, labels))}"
        )
    return labels[result["category_id"]]


def write_coco_dataset(results: FolderResults, path: Path) -> int:
    """Writes one JSON file of COCO instances, with scores, that FiftyOne, CVAT and comask itself read.

    Masks are compressed RLEs, so no pixel, hole or part is lost. `bbox` is the mask's bounds in whole
    pixels: FiftyOne cuts masks at their rounded boxes, and takes negative corners for places from the
    end. Results whose mask has no pixel are left out, since CVAT refuses the whole file for one of
    them. Category ids are the data set's if all are positive integers; else they count from 1 on, since
    CVAT takes 0 for none.

    Args:
        results: what was found.
        path: the file; nothing is at `path` until it is complete.

    Returns:
        The number of results that were left out, since their mask has no pixel.

    Raises:
        DataError: when a result has an unknown category or a segmentation that cannot be used.
        OSError: when the file cannot be written.
    """
    ids = [category.id for category in results.categories]
    if not all(isinstance(id_, int) and id_ > 0 for id_ in ids):
        ids = list(range(1, len(ids) + 1))
    categories = [
        {"id": id_, "name": category.name}
        for id_, category in zip(ids, results.categories, strict=True)
    ]
    head = {  # datumaro looks for the licences, even if there are none
        "info": {"description": "detections of comask"}, "licenses": [], "categories": categories
    }  # fmt: skip
    images = []
    number = left_out = 0
    with whole_file(path) as file:
        file.write(json.dumps(head)[:-1].encode() + b', "annotations": [')
        for image, entries in results.found:
            images.append(asdict(image))
            instances = results.instances(image, entries)
            left_out += len(entries) - len(instances)
            for label, score, mask in instances:
                x1, y1, x2, y2 = mask.bounds
                annotation = {
                    "id": number + 1,
                    "image_id": image.id,
                    "category_id": ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": mask.area,
                    "iscrowd": 0,
                    "score": score,
                    "segmentation": mask.to_coco(),
                }
                file.write((b",\n" if number else b"\n") + json.dumps(annotation).encode())
                number += 1
        file.write(b'\n], "images": ' + json.dumps(images).encode() + b"}\n")
    return left_out
