"""`shapes`: a synthetic instance segmentation set in COCO's format, made on the fly from a seed.

Images of 128x96 or 96x128 pixels: grayish textured backgrounds with unannotated strokes and blobs,
and 1 to 4 objects of eight classes, 10 to 100 pixels across, at any angle. Objects are painted back to
front and hide each other; a mask is what stays visible, at least three quarters of its object. The
hue hints at the class, so that a network from scratch learns them in minutes; crowds, strokes and
neighbours in hue keep it from being enough. About 4 % of the images are empty, and about 5 % hold
a crowd: many tiny shapes of one class under one `iscrowd` annotation. Image `i` of seed `s` depends on
`(s, i)` alone, whatever was asked for before; OpenCV before 4.11 draws edges a little differently.

This file is FROZEN: a test checks its hash. Figures measured on `shapes` can only be compared while
the generator stays the same, so a different generator needs a new name and new figures.
"""

from __future__ import annotations

from copy import deepcopy
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
from numpy.typing import NDArray

from comask.data.source import Category, ImageInfo

# Functions whose last bit depends on the CPU (sin, exp, sums) are taken in f64, so that they cannot
# flip a pixel; what is done per pixel in f32 is exact everywhere.
Points = NDArray[np.float64]  # [points, 2] as (x, y)
Pixels = NDArray[np.float32]  # [H, W] or [H, W, 3]
Rng = np.random.Generator
Annotations = list[dict[str, Any]]

LONG_SIDE, SHORT_SIDE, EMPTY_SHARE, CROWD_SHARE = 128, 96, 0.04, 0.05  # sides in pixels
MAX_OBJECTS, MIN_MEMBERS, MAX_MEMBERS = 4, 12, 25  # in an image, and tiny shapes in a crowd
DIAMETERS, MEMBER_DIAMETERS = (10.0, 100.0), (5.0, 8.0)
HUE_SPREAD = 0.025  # standard deviation in turns; neighbouring classes are 1/8 apart
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.75, 24
MAX_OUTSIDE, PLACEMENT_TRIES = 0.1, 12  # the former of an object's width, past the image's edge
# RGB distance of an object from what it is painted on, and how far a texture strays from that.
MIN_COLOUR_DISTANCE, TEXTURE_REACH = 80.0, 15.0
SUPERSAMPLING, CACHED_IMAGES = 4, 8
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


def _corners(radii: list[float], *, turn: float = 0.0, centre_x: float = 0.0) -> Points:
    """Corners at even angles around a centre, at the given distances from it."""
    angles = turn + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([centre_x + radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_CROSS = [(1.05, 0.42), (0.42, 0.42), (0.42, 1.05), (-0.42, 1.05), (-0.42, 0.42), (-1.05, 0.42)]
_ARROW = [(-1.1, -0.4), (0.0, -0.4), (0.0, -0.95), (1.1, 0), (0.0, 0.95), (0.0, 0.4)]
# Of each class the outline and then, if anything, what is cut out of it; in units of the radius.
SHAPES: dict[str, tuple[Points, ...]] = {
    "circle": (_corners([1.0] * 64),),
    "square": (_corners([1.22] * 4, turn=np.pi / 4),),
    "triangle": (_corners([1.15] * 3),),
    "star": (_corners([1.15, 0.6] * 5),),
    "ring": (_corners([1.0] * 64), _corners([0.45] * 64)),
    "cross": (np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),),
    "crescent": (_corners([1.05] * 64), _corners([0.75] * 64, centre_x=0.6)),
    "arrow": (np.array([*_ARROW, (-1.1, 0.4)]),),
}
CATEGORIES = tuple(Category(id=number, name=name) for number, name in enumerate(SHAPES, start=1))


def _random_stamp(rng: Rng, category: Category, diameters: tuple[float, float]) -> Pixels:
    """A shape of random size, stretch and angle, as coverage f32 [h, w] in 0..1.

    The logarithm of the size is the mean of two uniform draws: extremes are rare, but there.
    """
    smallest, largest = np.log(diameters).tolist()
    radius = np.exp(rng.uniform(smallest, largest, 2).mean()) / 2
    stretch = np.exp(rng.uniform(np.log(0.75), np.log(1.33)) / 2)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    to_pixels = radius * np.array([[stretch], [1 / stretch]]) * np.array([[cos, sin], [-sin, cos]])
    polygons = [polygon @ to_pixels for polygon in SHAPES[category.name]]
    origin = polygons[0].min(axis=0) - 1 - rng.random(2)  # anywhere within a pixel
    width, height = (np.ceil(polygons[0].max(axis=0) - origin).astype(int) + 1).tolist()
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    for polygon, value in zip(polygons, (SUPERSAMPLING**2, 0), strict=False):
        corners = (polygon - origin) * SUPERSAMPLING - 0.5  # OpenCV counts from a pixel's centre
        cv2.fillPoly(fine, [np.rint(corners * 2**4).astype(np.int32)], value, shift=4)
    covered = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return covered.astype(np.float32) / np.float32(SUPERSAMPLING**2)


def _colours(rng: Rng, category: Category, count: int) -> Points:
    """Random vivid colours of the category's hue, more or less, [count, 3] in 0..255."""
    hue = (category.id / len(SHAPES) + rng.normal(0, HUE_SPREAD, count)) % 1
    saturation, value = rng.uniform(0.6, 1, count), rng.uniform(0.5, 1, count)
    # each channel falls from full to none over a third of the circle of hues
    third = np.abs((hue[:, None] - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5)
    pure = (2 - 6 * third).clip(0, 1)
    return np.asarray(255 * value[:, None] * (1 - saturation[:, None] * (1 - pure)))


def _noise(rng: Rng, shape: tuple[int, ...], sigma: float) -> Pixels:
    """Gaussian noise of 256 levels, several times as quick as `rng.standard_normal`."""
    levels = _QUANTILES * np.float32(sigma)
    return np.asarray(cv2.LUT(rng.integers(0, 256, shape, np.uint8), levels), np.float32)


def _stripes(rng: Rng, shape: tuple[int, ...], period: tuple[float, float], reach: float) -> Pixels:
    """A sine of random period in pixels, place and direction in the image and in RGB, [H, W, 3]."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(*period)
    y = np.arange(shape[0])[:, None] * np.sin(angle) * frequency + phase
    x = np.arange(shape[1]) * np.cos(angle) * frequency
    wave = (np.sin(y) * np.cos(x) + np.cos(y) * np.sin(x)).astype(np.float32)  # sin(x + y)
    tint = rng.standard_normal(3)
    tint *= reach / np.sqrt((tint**2).sum())
    return np.asarray(cv2.merge([wave * np.float32(channel) for channel in tint]), np.float32)


def _background(rng: Rng, height: int, width: int) -> Pixels:
    """Clouds, stripes, checks or grain, then strokes and blobs nobody is to find, [H, W, 3]."""
    has_clouds, has_stripes, has_checks = rng.random(3) < (0.85, 0.5, 0.35)
    clouds = has_clouds * rng.uniform(5, 28) * rng.standard_normal((*rng.integers(2, 8, 2), 3))
    clouds = clouds * 0.3 + rng.uniform(40, 215) + rng.uniform(-15, 15, 3)
    canvas = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    if has_stripes:
        canvas += _stripes(rng, (height, width), (4, 40), rng.uniform(3, 14))
    if has_checks:
        cell, contrast = rng.integers(3, 16), rng.uniform(4, 12)
        checks = (np.arange(height)[:, None] // cell + np.arange(width) // cell) % 2
        canvas += (checks * contrast).astype(np.float32)[..., None]
    else:
        canvas += _noise(rng, (height, width), rng.uniform(0, 8))[..., None]
    drawing = canvas.clip(0, 255).astype(np.uint8)  # OpenCV draws smooth edges in u8 only
    for _ in range(rng.integers(0, 4)):
        colour = (rng.uniform(10, 245) + rng.uniform(-30, 30, 3)).tolist()
        start, bend, end = rng.random((3, 2)) * (width, height)
        if rng.random() < 0.35:
            radii = rng.uniform(1, 4, 7).tolist()  # unequal, lest a blob looks like a circle
            cv2.fillPoly(drawing, [np.rint(start + _corners(radii)).astype(np.int32)], colour)
        else:
            bend = bend if rng.random() < 0.5 else (start + end) / 2  # curved or straight
            t = np.linspace(0, 1, 24)[:, None]
            curve = np.rint((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end)
            points, thickness = [curve.astype(np.int32)], int(rng.integers(1, 3))
            cv2.polylines(drawing, points, False, colour, thickness, cv2.LINE_AA)
    return np.asarray(drawing, np.float32)


class _Scene:
    """An image being painted, from the back to the front."""

    def __init__(self, rng: Rng, height: int, width: int) -> None:
        self.rng, self.canvas = rng, _background(rng, height, width)
        self.painted: list[tuple[Category, bool]] = []  # class, and whether it is a crowd
        self.owner = np.zeros((height, width), np.uint8)  # 0: background, k: the k-th of `painted`
        self.visible, self.needed = np.zeros(0), np.zeros(0)  # pixels of each that show, and must

    def add_crowd(self) -> None:
        """Paints a cluster of tiny shapes of one class, which count as one thing."""
        category = CATEGORIES[self.rng.integers(len(CATEGORIES))]
        self.painted.append((category, True))
        centre, spread = self.rng.uniform(0.2, 0.8, 2) * self.owner.shape, self.rng.uniform(7, 12)
        for _ in range(self.rng.integers(MIN_MEMBERS, MAX_MEMBERS, endpoint=True)):
            stamp = _random_stamp(self.rng, category, MEMBER_DIAMETERS)
            corner = centre + spread * self.rng.standard_normal(2)
            inside = corner.clip(0, np.subtract(self.owner.shape, stamp.shape))
            self._paint(category, *self._under(stamp, *inside.astype(int).tolist()))
        self.visible = np.append(self.visible, (self.owner == len(self.painted)).sum())
        self.needed = np.append(self.needed, MIN_VISIBLE_SHARE * self.visible[-1])

    def add_object(self) -> None:
        """Paints an object where it and all before it stay visible enough, or nothing at all."""
        category = CATEGORIES[self.rng.integers(len(CATEGORIES))]
        stamp = _random_stamp(self.rng, category, DIAMETERS)
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

    def _under(self, stamp: Pixels, top: int, left: int) -> tuple[tuple[slice, slice], Pixels]:
        """Where in the image a stamp placed there falls, and the part of it that does."""
        y, x = slice(max(top, 0), top + stamp.shape[0]), slice(max(left, 0), left + stamp.shape[1])
        height, width = self.owner.shape
        return (y, x), stamp[y.start - top : height - top, x.start - left : width - left]

    def _paint(self, category: Category, window: tuple[slice, slice], alpha: Pixels) -> None:
        """Paints the last of `painted`, in a colour distinct from all that shows there."""
        pixels, owner = self.canvas[window], self.owner[window]
        step = 1 + max(alpha.shape) // 8  # a sample of the pixels is quicker and does as well
        shown = pixels[::step, ::step].reshape(-1, 3)
        candidates = _colours(self.rng, category, 24)[:, None]
        distances = np.sqrt(((candidates - shown) ** 2).sum(axis=2)).min(axis=1)
        # The first that is far enough, or else the farthest.
        colour = candidates[np.argmax(np.minimum(distances, MIN_COLOUR_DISTANCE)), 0]
        grain = _noise(self.rng, alpha.shape, 3)
        fill = np.asarray(cv2.merge([grain + np.float32(c) for c in colour]), np.float32)
        style, extent = self.rng.integers(3), max(alpha.shape)
        if style > 0:  # half a period across the shape makes it fade from one end to the other
            periods = (2 * extent, 3 * extent) if style == 1 else (3, max(6, extent / 3))
            fill += _stripes(self.rng, alpha.shape, periods, TEXTURE_REACH)
        pixels += cv2.merge([alpha] * 3) * (fill - pixels)
        owner[alpha >= 0.5] = len(self.painted)


def _rng_and_size(seed: int, index: int) -> tuple[Rng, int, int]:
    """The generator that makes an image, and the image's height and width: its first draw."""
    rng = np.random.default_rng([seed, index])
    return (rng, SHORT_SIDE, LONG_SIDE) if rng.integers(2) == 0 else (rng, LONG_SIDE, SHORT_SIDE)


def render(seed: int, index: int) -> tuple[NDArray[np.uint8], Annotations]:
    """Image `index` of the set, u8 [H, W, 3] in RGB, and its COCO annotations."""
    rng, height, width = _rng_and_size(seed, index)
    scene = _Scene(rng, height, width)
    if rng.random() >= EMPTY_SHARE:
        if rng.random() < CROWD_SHARE:
            scene.add_crowd()
        for _ in range(rng.integers(1, MAX_OBJECTS, endpoint=True)):
            scene.add_object()
    annotations: Annotations = []
    for number, (category, is_crowd) in enumerate(scene.painted, start=1):
        mask = (scene.owner == number).astype(np.uint8)
        counts = pycocotools.mask.encode(np.asfortranarray(mask))["counts"].decode("ascii")
        ids = {"id": index * 100 + number, "image_id": index + 1, "category_id": category.id}
        extent = {"bbox": [float(v) for v in cv2.boundingRect(mask)], "area": int(mask.sum())}
        segmentation = {"size": [height, width], "counts": counts}
        annotations.append(ids | extent | {"iscrowd": int(is_crowd), "segmentation": segmentation})
    noise = _noise(rng, scene.canvas.shape, rng.uniform(1.5, 3))
    image = cv2.add(scene.canvas, noise, dtype=cv2.CV_8U)  # rounds and clips
    return np.asarray(image, np.uint8), annotations


class ShapesSource:
    """The first `num_images` images of the set that `seed` names; an `InstanceSource`."""

    categories = CATEGORIES

    def __init__(self, *, num_images: int, seed: int) -> None:
        self._indices, self._seed = range(num_images), seed
        # A dict, since the workers of a data loader could not unpickle a functools.lru_cache.
        self._recent: dict[int, tuple[NDArray[np.uint8], Annotations]] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def info(self, index: int) -> ImageInfo:
        """Id, name and size of image `index`, without rendering it."""
        id_ = self._indices[index] + 1
        _, height, width = _rng_and_size(self._seed, id_ - 1)
        return ImageInfo(id=id_, file_name=f"{id_:06d}.png", height=height, width=width)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as u8 [H, W, 3], RGB; the caller's own copy."""
        return self._rendered(index)[0].copy()

    def annotations(self, index: int) -> Annotations:
        """COCO annotations of image `index`, with RLE masks; the caller's own copy."""
        return deepcopy(self._rendered(index)[1])

    def _rendered(self, index: int) -> tuple[NDArray[np.uint8], Annotations]:
        key = self._indices[index]  # IndexError beyond the end
        if key not in self._recent:
            if len(self._recent) >= CACHED_IMAGES:
                del self._recent[next(iter(self._recent))]  # the oldest
            self._recent[key] = render(self._seed, key)
        return self._recent[key]
