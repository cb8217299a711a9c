"""Measures the objects of a checked data set, for the page of `comask check`."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.data.check_annotations import fits, from_corner, iou
from comask.data.problems import Kind, Problem
from comask.data.source import InstanceSource
from comask.errors import one_line
from comask.segmentation import read_segmentation

SMALL, MEDIUM = 32, 96  # COCO's limits of the square root of an object's area, in pixels
Annotation: TypeAlias = dict[str, Any]
# Problems whose annotations are kept with a change, so that a picture can show them.
_CHANGED = {Kind.CLIPPED.words, Kind.SOME_SHORT.words, Kind.BAD_AREA.words}


def size_name(area: float) -> str:
    """Returns `small`, `medium` or `large`, by COCO's limits of an object's area in pixels."""
    return "small" if area < SMALL**2 else "medium" if area < MEDIUM**2 else "large"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One annotation of a data set.

    Attributes:
        image: the index of its image.
        number: its place among the image's annotations.
    """

    image: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """The measures of N images with O objects; crowds are no objects.

    Attributes:
        sides: [O] f64, the square root of each object's area in pixels.
        objects: the place of each object.
        per_image: [N] i64, the number of objects of each image.
        image_sizes: [N, 2] i64, (h, w) in pixels.
        crowds: the place and the area in pixels of each crowd.
        beside: the objects whose boxes are far from their masks, with the IoU of both.
        changed: annotations that were kept with a change, with the change and the problem's example.
            Those in `beside` and those that are no examples are missing.
    """

    sides: NDArray[np.float64]
    objects: list[Place]
    per_image: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    crowds: list[tuple[Place, int]]
    beside: list[tuple[Place, float]]
    changed: list[tuple[Place, str, str]]

    @classmethod
    def of(cls, source: InstanceSource, problems: tuple[Problem, ...]) -> Survey:
        """Rasterises each mask of `source`, which `open_source` has checked."""
        sides, objects, sizes, counts = [], list[Place](), [], []
        crowds, beside, changed = [], [], []
        examples = [(p.consequence, e) for p in problems if p.kind in _CHANGED for e in p.examples]
        for index in range(len(source)):
            info, annotations = source.info(index), source.annotations(index)
            sizes.append((info.height, info.width))
            counts.append(sum(not a.get("iscrowd") for a in annotations))
            named = [case for case in examples if case[1].startswith(one_line(info.file_name))]
            for number, annotation in enumerate(annotations):
                place = Place(image=index, number=number)
                mask = read_segmentation(annotation["segmentation"], info.height, info.width)
                if annotation.get("iscrowd"):
                    crowds.append((place, mask.area))
                    continue
                objects.append(place)
                sides.append(mask.area**0.5)
                if not fits(annotation["bbox"], mask.bounds):
                    beside.append((place, iou(from_corner(*annotation["bbox"]), mask.bounds)))
                    continue
                start = one_line(f"{info.file_name} annotation {shortened(annotation['id'])}:")
                changed += [(place, what, e) for what, e in named if e.startswith(start)]
        return cls(
            sides=np.array(sides, np.float64),
            objects=objects,
            per_image=np.array(counts, np.int64),
            image_sizes=np.array(sizes, np.int64).reshape(-1, 2),
            crowds=crowds,
            beside=beside,
            changed=changed,
        )

    def of_sizes(self) -> dict[str, int]:
        """Returns the number of COCO's small, medium and large objects."""
        small, rest = int((self.sides < SMALL).sum()), int((self.sides >= MEDIUM).sum())
        return {"small": small, "medium": len(self.sides) - small - rest, "large": rest}
