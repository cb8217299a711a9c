"""Scenes of rectangles whose errors are known, and what is counted in them by plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from comask.data.source import Category, ImageInfo
from comask.evaluate import Truth
from comask.segmentation import read_segmentation

SIDE = 200
CATEGORIES = (
    Category(id="z", name="cat"),
    Category(id=7, name="dog"),
    Category(id=3, name="<cow>"),
)
Box = tuple[float, float, float, float]  # x, y, w, h


def rectangle(box: Box) -> dict[str, Any]:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return read_segmentation([polygon], SIDE, SIDE).to_coco()


@dataclass
class Scene:
    """A source of gray images with rectangles, and what was found in them.

    Attributes:
        objects: of each image.
        results: of each image.
        categories: the classes.
    """

    objects: list[list[dict[str, Any]]] = field(default_factory=list)
    results: list[list[dict[str, Any]]] = field(default_factory=list)
    categories: tuple[Category, ...] = CATEGORIES

    def add_image(self) -> None:
        self.objects.append([])
        self.results.append([])

    def add_object(self, label: int, box: Box, *, crowd: bool = False, part: float = 1.0) -> None:
        """In the last image; its mask is `part` of its box, from the left."""
        x, y, w, h = box
        self.objects[-1].append(
            {"id": 1 + sum(map(len, self.objects)), "image_id": len(self.objects),
             "category_id": self.categories[label].id, "bbox": list(box), "area": part * w * h,
             "iscrowd": int(crowd), "segmentation": rectangle((x, y, part * w, h))}
        )  # fmt: skip

    def add_result(self, label: int, box: Box, score: float, *, part: float = 1.0) -> None:
        x, y, w, h = box
        self.results[-1].append(
            {"image_id": len(self.objects), "category_id": self.categories[label].id,
             "bbox": list(box), "score": score, "segmentation": rectangle((x, y, part * w, h))}
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.objects)

    def info(self, index: int) -> ImageInfo:
        return ImageInfo(id=index + 1, file_name=f"{index + 1}.png", height=SIDE, width=SIDE)

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((SIDE, SIDE, 3), 128, np.uint8)

    def annotations(self, index: int) -> list[dict[str, Any]]:
        return self.objects[index]

    @property
    def truth(self) -> Truth:
        return Truth(self, list(range(len(self))))


def random_scene(seed: int, images: int) -> Scene:
    """Objects, and detections that lie over them, beside them or nowhere; some scores are equal."""
    rng, scene = np.random.default_rng(seed), Scene()

    def box() -> NDArray[np.float64]:
        return np.concatenate((rng.uniform(0, 110, 2), rng.uniform(20, 80, 2)))

    for _ in range(images):
        scene.add_image()
        boxes = [box() for _ in range(rng.integers(0, 6))]
        labels = rng.integers(0, 3 if seed % 2 else 2, len(boxes)).tolist()  # some lack a class
        for label, place in zip(labels, boxes, strict=True):
            crowd = rng.random() < 0.15
            scene.add_object(label, tuple(place), crowd=crowd, part=rng.uniform(0.6, 1))
        for _ in range(rng.integers(0, 14)):
            label, place = int(rng.integers(0, 3)), box()
            if boxes and rng.random() < 0.8:
                near = int(rng.integers(len(boxes)))
                place = np.abs(boxes[near] + rng.normal(0, rng.choice([2, 12]), 4)) + 0.1
                label = labels[near] if rng.random() < 0.7 else label
            score = float(
                np.float32(rng.integers(0, 12) / 12 if rng.random() < 0.5 else rng.random())
            )
            scene.add_result(label, tuple(place), score, part=rng.uniform(0.6, 1))
    return scene


@dataclass(frozen=True)
class Judged:
    """What pycocotools says of one image's detections at IoU 0.5, and all overlaps.

    Attributes:
        found: for each detection the object that it matches, or None.
        ignored: whether each detection counts for nothing.
        iou: [detections, objects], 0 for crowds.
        order: the detections by falling score.
    """

    found: list[int | None]
    ignored: list[bool]
    iou: NDArray[np.float64]
    order: list[int]


def coco_scorer(scene: Scene, task: str) -> Any:
    """pycocotools' evaluation at IoU 0.5, of all sizes and detections."""
    labels = {category.id: label for label, category in enumerate(scene.categories)}
    dataset = scene.truth.dataset
    rows = [
        row | {"category_id": labels[row["category_id"]] + 1, "iscrowd": 0, "id": number,
               "area": row["bbox"][2] * row["bbox"][3]}
        for number, row in enumerate((r for image in scene.results for r in image), start=1)
    ]  # fmt: skip
    sides = []
    for entries in (dataset["annotations"], rows):
        coco = COCO()
        # pycocotools changes what it reads
        coco.dataset = {**dataset, "annotations": [dict(entry) for entry in entries]}
        coco.createIndex()
        sides.append(coco)
    scorer = COCOeval(*sides, task)
    scorer.params.iouThrs = np.array([0.5])
    scorer.params.maxDets = [10**6]
    scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
    scorer.evaluate()
    scorer.accumulate()
    return scorer


def judged(scene: Scene, task: str) -> list[Judged]:
    """Every image, as pycocotools judges it."""
    from pycocotools import mask as coco_mask

    scorer = coco_scorer(scene, task)
    name = "segmentation" if task == "segm" else "bbox"
    first_object = np.cumsum([0, *map(len, scene.objects)]).tolist()
    first_result = np.cumsum([0, *map(len, scene.results)]).tolist()
    images = []
    for image, (objects, results) in enumerate(zip(scene.objects, scene.results, strict=True)):
        found: list[int | None] = [None] * len(results)
        ignored = [False] * len(results)
        for entry in scorer.evalImgs:
            if entry is None or entry["image_id"] != image + 1:
                continue
            matches = zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True)
            for number, thing, ignore in matches:
                place = number - 1 - first_result[image]
                ignored[place] = bool(ignore)
                if thing and not ignore:
                    found[place] = int(thing) - 1 - first_object[image]
        iou = np.zeros((len(results), len(objects)))
        for i, result in enumerate(results):
            for j, thing in enumerate(objects):
                if not thing["iscrowd"]:
                    iou[i, j] = coco_mask.iou([result[name]], [thing[name]], [0])[0, 0]
        order = sorted(range(len(results)), key=lambda i: -results[i]["score"])
        images.append(Judged(found, ignored, iou, order))
    return images


def kind_of(scene: Scene, image: int, judge: Judged, detection: int) -> tuple[str, int | None]:
    """TIDE's kind of error of a detection and the object it means; `right` or `ignored` otherwise."""
    if judge.ignored[detection]:
        return "ignored", None
    if judge.found[detection] is not None:
        return "right", None
    own, other = (-1.0, None), (-1.0, None)
    for j, thing in enumerate(scene.objects[image]):
        iou = judge.iou[detection, j]
        if thing["iscrowd"]:
            continue
        if thing["category_id"] == scene.results[image][detection]["category_id"]:
            own = max(own, (iou, j), key=lambda pair: pair[0])
        else:
            other = max(other, (iou, j), key=lambda pair: pair[0])
    if 0.1 <= own[0] < 0.5:
        return "localization", own[1]
    if other[0] >= 0.5:
        return "classification", other[1]
    if own[0] >= 0.5:
        return "duplicate", None
    return ("background" if max(own[0], other[0]) <= 0.1 else "both"), None


def fixed(scene: Scene, task: str, kind: str) -> Scene:
    """The same scene where one kind of error was put right, as TIDE's program does."""
    better = Scene(categories=scene.categories)
    for image, judge in enumerate(judged(scene, task)):
        objects, results = scene.objects[image], scene.results[image]
        kinds = [kind_of(scene, image, judge, i) for i in range(len(results))]
        covered = {j for j in judge.found if j is not None}
        fixer: dict[int, int] = {}
        for i in judge.order:
            if (meant := kinds[i][1]) is not None and meant not in covered:
                fixer.setdefault(meant, i)
        kept = []
        for i, result in enumerate(results):
            if kinds[i][0] != kind:
                kept.append(result)
            elif (meant := kinds[i][1]) is not None and fixer.get(meant) == i:
                names = ("category_id",) if kind == "classification" else ("bbox", "segmentation")
                kept.append(result | {name: objects[meant][name] for name in names})
        better.results.append(kept)
        missed = [
            j for j, thing in enumerate(objects)
            if not thing["iscrowd"] and j not in covered and j not in fixer
        ]  # fmt: skip
        left_out = missed if kind == "missed" else []
        better.objects.append([thing for j, thing in enumerate(objects) if j not in left_out])
    return better


def ap50(scene: Scene, task: str) -> float:
    """What `comask eval` computes."""
    rows = [row for image in scene.results for row in image]
    return scene.truth.score(rows).values[task]["AP50"]


def confusion(scene: Scene, task: str, thresholds: Sequence[float]) -> list[list[int]]:
    """Counts pairs by plain loops."""
    labels = {category.id: label for label, category in enumerate(scene.categories)}
    size = len(labels)
    matrix = [[0] * (size + 1) for _ in range(size + 1)]
    for objects, results, judge in zip(
        scene.objects, scene.results, judged(scene, task), strict=True
    ):
        shown = [
            i for i in judge.order
            if not judge.ignored[i]
            and results[i]["score"] >= thresholds[labels[results[i]["category_id"]]]
        ]  # fmt: skip
        partner = {i: judge.found[i] for i in shown if judge.found[i] is not None}
        for i in shown:
            if i in partner:
                continue
            best = None
            for j, thing in enumerate(objects):
                if thing["iscrowd"] or j in partner.values() or judge.iou[i, j] < 0.5:
                    continue
                if thing["category_id"] == results[i]["category_id"]:
                    continue  # matched by pycocotools if it could be
                if best is None or judge.iou[i, j] > judge.iou[i, best]:
                    best = j
            if best is not None:
                partner[i] = best
        for i in shown:
            j = partner.get(i)
            row = size if j is None else labels[objects[j]["category_id"]]
            matrix[row][labels[results[i]["category_id"]]] += 1
        for j, thing in enumerate(objects):
            if not thing["iscrowd"] and j not in partner.values():
                matrix[labels[thing["category_id"]]][size] += 1
    return matrix
