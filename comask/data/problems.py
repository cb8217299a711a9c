"""Defines the kinds of problem that `comask.data.check` finds, and their descriptions for users."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from comask.errors import one_line

EXAMPLES = 3  # examples that are shown of each kind of problem


_BOXES = "a bbox is [x, y, width, height] in pixels from the image's upper left corner"
_MASKS = (
    "a segmentation is a list of polygons [x1, y1, x2, …] in pixels or an RLE of its image's size"
)
_IDS = "give annotations the id of {}, of the same type (1 is not '1')"
_ONLY_BOXES = "CoMask learns masks: give annotations a segmentation, since boxes are not enough"
_CROWDS = (
    "crowds are not learnt, and CVAT marks every painted mask as a crowd: set iscrowd to 0 where an "
    "annotation is one object (jq '.annotations[].iscrowd = 0' old.json > new.json)"
)


class Kind(Enum):
    """Every kind of problem, in the order of the report.

    Attributes:
        words: the problem's description in the plural.
        consequence: comask's treatment of the affected images or annotations.
        remedy: advice for data in which this problem leaves no object; empty if that cannot happen.
    """

    NO_SIZE = "images annotated with a side below 1 pixel", "left out"
    SHARED_ID = "images sharing an id with a different one", "all left out"
    REPEATED_IMAGE = "images listed again", "left out"
    ELSEWHERE = "images with a file_name that leads out of their folder", "left out"
    NO_FILE = "images without a file", "left out"
    BAD_HEADER = "images with an unreadable header", "left out"
    OTHER_SIZE = "images of another size than annotated", "left out"
    UNREADABLE = (
        "annotations that cannot be read", "left out",
        "correct the files named above, or give the data in another format",
    )  # fmt: skip
    UNKNOWN_IMAGE = "annotations of unknown images", "left out", _IDS.format("an image")
    REPEATED_ANNOTATION = "annotations listed again", "left out"
    NO_FIELD = (
        "annotations without bbox or category_id", "left out",
        "give annotations a bbox and a category_id",
    )  # fmt: skip
    UNKNOWN_CATEGORY = "annotations of unknown categories", "left out", _IDS.format("a category")
    BAD_CROWD = (
        "annotations with an iscrowd other than 0 and 1", "left out",
        "iscrowd is 0 for one object and 1 for a crowd",
    )  # fmt: skip
    BAD_BOX = "boxes that are not four numbers", "left out", _BOXES
    NO_AREA = "boxes without area", "left out", _BOXES
    OUTSIDE = "boxes outside the image", "left out", _BOXES
    NO_SEGMENTATION = "annotations without segmentation", "left out", _ONLY_BOXES
    ONLY_SHORT = "annotations with only polygons of fewer than 3 points", "left out", _MASKS
    NO_POLYGONS = "segmentations neither polygons nor RLE", "left out", _MASKS
    BAD_RLE = "masks in RLE that cannot be of the image", "left out", _MASKS
    NO_PIXEL = "masks without a pixel", "left out", _MASKS
    CLIPPED = "boxes partly outside the image", "clipped"
    BESIDE_MASK = (
        "boxes far from their masks",
        "used as they are; data.boxes=mask takes boxes from the masks",
    )
    SOME_SHORT = "annotations with a polygon of fewer than 3 points", "polygon left out"
    BAD_AREA = "annotations with an area that is not a number", "area ignored"
    NO_ID = "annotations without a unique id", "given a new one"
    MOSTLY_CROWDS = (
        "annotations marked as crowds by iscrowd 1", "more than half of all; not learnt", _CROWDS
    )  # fmt: skip
    NAMESAKE = "categories without an object, named like one with objects", "left out"

    def __init__(self, words: str, consequence: str, remedy: str = "") -> None:
        self.words, self.consequence, self.remedy = words, consequence, remedy


NOTES = {Kind.BESIDE_MASK, Kind.MOSTLY_CROWDS}  # the affected annotations are used unchanged

_SINGULAR = {"boxes": "box", "categories": "category"}

Findings = dict[Kind, list[str]]  # descriptions of all cases of each kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One kind of problem of a data set.

    Attributes:
        kind: the problem's description in the plural, such as "boxes without area".
        count: the number of cases.
        examples: the first 3 cases, with the file, the annotation's id and the values.
        consequence: comask's treatment of the cases, such as "left out" or "clipped".
        remedy: advice for data in which this problem leaves no object; empty if that cannot happen.
    """

    kind: str
    count: int
    examples: tuple[str, ...]
    consequence: str
    remedy: str = ""

    @property
    def counted(self) -> str:
        """Count and description, such as "9 boxes without area" or "1 box without area"."""
        noun, rest = self.kind.split(" ", 1)
        if self.count == 1:
            noun = _SINGULAR.get(noun, noun.removesuffix("s"))
        return f"{self.count} {noun} {rest}"


def without_objects(names: list[str], consequence: str) -> str:
    """Returns the line on categories without an object, as `describe` does for a problem."""
    kind, shown = "categories without an object", tuple(names[:EXAMPLES])
    problem = Problem(kind=kind, count=len(names), examples=shown, consequence=consequence)
    return one_line(describe([problem])[0])


def describe(problems: list[Problem]) -> list[str]:
    """Returns a line per problem: `data: 9 boxes without area (left out): 1.jpg annotation 7: …`."""
    lines = []
    for problem in problems:
        examples = [*problem.examples, "…"] if problem.count > EXAMPLES else problem.examples
        lines.append(f"data: {problem.counted} ({problem.consequence}): {', '.join(examples)}")
    return lines


class UnsoundError(Exception):
    """An image or annotation that has to be left out."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
