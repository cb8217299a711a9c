"""`shapes-clutter`: a synthetic set like `shapes` in which boxes are hard to find.

Its objects are thin or concave (rods, corners, channels, hoops), hide each other down to 35 % of their
pixels, and up to eight share an image, about two thirds of them of one class. So much of a RoI belongs to
neighbours of the same class, which is what the collaboration of mask and boxes is for. Backgrounds,
colours, textures and sizes of images are those of `shapes`; there are no crowds. Image `i` of seed `s`
depends on `(s, i)` alone.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from comask.data.shapes import (
    CACHED_IMAGES,
    EMPTY_SHARE,
    MAX_OUTSIDE,
    SUPERSAMPLING,
    Annotations,
    Pixels,
    Points,
    Rng,
    ShapesSource,
    _corners,
    _noise,
    _rng_and_size,
    _Scene,
)
from comask.data.shapes import SHAPES as PLAIN
from comask.data.source import Category

MAX_OBJECTS, SAME_CLASS = 8, 0.67  # in an image, and the share that is of the image's own class
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.35, 24
DIAMETERS, PLACEMENT_TRIES = (14.0, 80.0), 30

_ROD = [(-1.2, -0.16), (1.2, -0.16), (1.2, 0.16), (-1.2, 0.16)]
_CORNER = [(-1.0, -1.0), (-0.6, -1.0), (-0.6, 0.6), (1.0, 0.6), (1.0, 1.0), (-1.0, 1.0)]
_CHANNEL = [
    (-1.0, -1.0), (-0.65, -1.0), (-0.65, 0.65), (0.65, 0.65), (0.65, -1.0), (1.0, -1.0), (1.0, 1.0),
    (-1.0, 1.0),
]  # fmt: skip
_PLUS = [(1.1, 0.2), (0.2, 0.2), (0.2, 1.1), (-0.2, 1.1), (-0.2, 0.2), (-1.1, 0.2)]
# Of each class the outline and then, if anything, what is cut out of it; in units of the radius.
OUTLINES: dict[str, tuple[Points, ...]] = {
    "circle": PLAIN["circle"],
    "rod": (np.array(_ROD),),
    "corner": (np.array(_CORNER),),
    "channel": (np.array(_CHANNEL),),
    "hoop": (_corners([1.0] * 64), _corners([0.72] * 64)),
    "plus": (np.array(_PLUS + [(-x, -y) for x, y in _PLUS]),),
    "sickle": (_corners([1.05] * 64), _corners([0.85] * 64, centre_x=0.45)),
    "arrow": PLAIN["arrow"],
}
CATEGORIES = tuple(Category(id=number, name=name) for number, name in enumerate(OUTLINES, start=1))


def _stamp(rng: Rng, category: Category) -> Pixels:
    """A shape of random size, stretch and angle, as coverage f32 [h, w] in 0..1, as in `shapes`."""
    smallest, largest = np.log(DIAMETERS).tolist()
    radius = np.exp(rng.uniform(smallest, largest, 2).mean()) / 2
    stretch = np.exp(rng.uniform(np.log(0.75), np.log(1.33)) / 2)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    to_pixels = radius * np.array([[stretch], [1 / stretch]]) * np.array([[cos, sin], [-sin, cos]])
    polygons = [polygon @ to_pixels for polygon in OUTLINES[category.name]]
    origin = polygons[0].min(axis=0) - 1 - rng.random(2)  # anywhere within a pixel
    width, height = (np.ceil(polygons[0].max(axis=0) - origin).astype(int) + 1).tolist()
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    for polygon, value in zip(polygons, (SUPERSAMPLING**2, 0), strict=False):
        corners = (polygon - origin) * SUPERSAMPLING - 0.5  # OpenCV counts from a pixel's centre
        cv2.fillPoly(fine, [np.rint(corners * 2**4).astype(np.int32)], value, shift=4)
    covered = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return covered.astype(np.float32) / np.float32(SUPERSAMPLING**2)


class _Clutter(_Scene):
    """A scene of crowded objects, most of them of one class."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.main = CATEGORIES[rng.integers(len(CATEGORIES))]

    def add_object(self) -> None:
        """Paints an object where it and all before it stay visible enough, or nothing at all."""
        category = self.main
        if self.rng.random() >= SAME_CLASS:
            category = CATEGORIES[self.rng.integers(len(CATEGORIES))]
        stamp = _stamp(self.rng, category)
        own = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * (stamp >= 0.5).sum())
        needed = np.append(self.needed, own)
        outside = np.array(stamp.shape) * MAX_OUTSIDE
        places = self.owner.shape - np.array(stamp.shape) + 2 * outside
        for _ in range(PLACEMENT_TRIES):
            corner = (self.rng.random(2) * places - outside).astype(int)
            window, alpha = self._under(stamp, *corner.tolist())
            solid = alpha >= 0.5
            hidden = np.bincount(self.owner[window][solid], minlength=len(needed))[1:]
            visible = np.append(self.visible - hidden, solid.sum())
            if (visible >= needed).all():
                self.painted.append((category, False))
                self._paint(category, window, alpha)
                self.visible, self.needed = visible, needed
                return


def render(seed: int, index: int) -> tuple[NDArray[np.uint8], Annotations]:
    """Image `index` of the set, u8 [H, W, 3] in RGB, and its COCO annotations."""
    import pycocotools.mask

    rng, height, width = _rng_and_size(seed, index)
    scene = _Clutter(rng, height, width)
    if rng.random() >= EMPTY_SHARE:
        for _ in range(rng.integers(1, MAX_OBJECTS, endpoint=True)):
            scene.add_object()
    annotations: Annotations = []
    for number, (category, _) in enumerate(scene.painted, start=1):
        mask = (scene.owner == number).astype(np.uint8)
        counts = pycocotools.mask.encode(np.asfortranarray(mask))["counts"].decode("ascii")
        annotation: dict[str, Any] = {
            "id": index * 100 + number,
            "image_id": index + 1,
            "category_id": category.id,
            "bbox": [float(v) for v in cv2.boundingRect(mask)],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": [height, width], "counts": counts},
        }
        annotations.append(annotation)
    noise = _noise(rng, scene.canvas.shape, rng.uniform(1.5, 3))
    image = cv2.add(scene.canvas, noise, dtype=cv2.CV_8U)  # rounds and clips
    return np.asarray(image, np.uint8), annotations


class ShapesClutterSource(ShapesSource):
    """The first `num_images` images of the set that `seed` names; an `InstanceSource`."""

    categories = CATEGORIES

    def _rendered(self, index: int) -> tuple[NDArray[np.uint8], Annotations]:
        key = self._indices[index]  # IndexError beyond the end
        if key not in self._recent:
            if len(self._recent) >= CACHED_IMAGES:
                del self._recent[next(iter(self._recent))]  # the oldest
            self._recent[key] = render(self._seed, key)
        return self._recent[key]
