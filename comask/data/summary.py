"""Counts the images, objects and categories of a data set for `comask check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from comask.data.problems import NOTES, Problem
from comask.data.source import Id, InstanceSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CategorySummary:
    """The counts of one category.

    Attributes:
        id: the category's id in the data set.
        name: the category's name.
        images: the number of images with an object of this category.
        objects: the number of objects of this category, without crowds.
    """

    id: Id
    name: str
    images: int
    objects: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The counts of a data set, and its problems.

    Attributes:
        images: the number of images that can be used.
        objects: the number of annotations that can be used, without crowds.
        crowds: the number of annotations that are marked as crowds.
        without_objects: the number of images without an object.
        categories: the counts of each category, the most frequent first.
        problems: the kinds of problem, with the treatment of each.
        sound: whether the whole data set can be used unchanged.
    """

    images: int
    objects: int
    crowds: int
    without_objects: int
    categories: tuple[CategorySummary, ...]
    problems: tuple[Problem, ...]
    sound: bool

    @classmethod
    def of(cls, source: InstanceSource) -> Summary:
        """Counts the annotations of `source`, which `open_source` has checked."""
        objects: Counter[Id] = Counter()
        images: Counter[Id] = Counter()
        crowds = without = 0
        for index in range(len(source)):
            annotations = source.annotations(index)
            ids = [a["category_id"] for a in annotations if not a.get("iscrowd")]
            crowds += len(annotations) - len(ids)
            without += not ids
            objects.update(ids)
            images.update(set(ids))
        categories = [
            CategorySummary(id=c.id, name=c.name, images=images[c.id], objects=objects[c.id])
            for c in source.categories
        ]
        problems = tuple(getattr(source, "problems", ()))
        notes = {kind.words for kind in NOTES}
        return cls(
            images=len(source),
            objects=objects.total(),
            crowds=crowds,
            without_objects=without,
            categories=tuple(sorted(categories, key=lambda c: -c.objects)),
            problems=problems,
            sound=all(problem.kind in notes for problem in problems),
        )
