"""Looks at an image in several views: whole, in tiles, mirrored, and at several sizes.

A large image that is resized to the network's canvas loses its small objects. Tiles keep them, and the
whole image, which always runs as well, keeps those larger than a tile, as in SAHI (Akyon et al. 2022,
https://arxiv.org/abs/2202.06934). Mirrored and otherwise resized views are test-time augmentation.
`comask.runtime.tiles` and `comask.runtime.augmented` make one result of all views of an image.

Regions are (x1, y1, x2, y2) in whole pixels of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import ceil
from typing import TypeAlias

import numpy as np

from comask.config import (
    AUGMENTATIONS,
    LEAST_TILE,
    MOST_OVERLAP,
    TILE_OVERLAP,
    PreprocessConfig,
    require_count,
)
from comask.errors import ConfigError
from comask.kernels.launch import Size
from comask.parallel import ordered_map
from comask.preprocess import (
    Pixels,
    Placement,
    Prepared,
    padded_shape,
    prepare,
    resized_shape,
    stacked,
)
from comask.runtime.augmented import Flips, averaged
from comask.runtime.backends.base import FramePredictor
from comask.runtime.images import FoundAt, batches
from comask.runtime.tiles import Region, joined
from comask.structures import Detections

FACTORS = (0.8, 1.25)  # of the short side, for `scale`

Places: TypeAlias = list[tuple[int, int]]  # first pixel and the one after the last, along one side


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Which views of an image run.

    Attributes:
        tile: side of the tiles in pixels of the image; None for no tiles. An image that fits into one
            tile has no tiles.
        tile_overlap: the share of a tile's side that the next tile has at least, above 0.
        tta: how else each tile and the whole image run: with left and right exchanged (`flip`), with top
            and bottom exchanged (`vflip`), at other short sides (`scale`); several in every combination.

    Raises:
        ConfigError: if a value is out of its range.
    """

    tile: int | None = None
    tile_overlap: float = TILE_OVERLAP
    tta: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.tile is not None:
            require_count("tile", self.tile)
            if self.tile < LEAST_TILE:
                raise ConfigError(f"tile: expected at least {LEAST_TILE} pixels, got {self.tile}")
        if not 0 < self.tile_overlap <= MOST_OVERLAP:
            raise ConfigError(
                f"tile_overlap: expected a share of a tile's side above 0, since objects are joined "
                f"where tiles overlap, and at most {MOST_OVERLAP}, got {self.tile_overlap}"
            )
        if isinstance(self.tta, str) or not set(self.tta) <= set(AUGMENTATIONS):
            raise ConfigError(f"tta: expected some of {', '.join(AUGMENTATIONS)}, got {self.tta!r}")

    @property
    def several(self) -> bool:
        """Whether an image may have more than one view."""
        return self.tile is not None or bool(self.tta)

    def regions(self, size: Size) -> list[Region]:
        """Returns the regions of an image of `size` (h, w): the whole image, then its tiles."""
        height, width = size
        whole = (0, 0, width, height)
        if self.tile is None or max(size) <= self.tile:
            return [whole]
        rows, columns = (_places(side, self.tile, self.tile_overlap) for side in size)
        return [whole, *((x1, y1, x2, y2) for (y1, y2), (x1, x2) in product(rows, columns))]

    def flips(self) -> list[Flips]:
        """Returns the ways in which a region is mirrored, the first of which leaves it as it is."""
        across, down = (
            (False, True) if name in self.tta else (False,) for name in ("flip", "vflip")
        )
        return list(product(across, down))

    def sizes(self, preprocess: PreprocessConfig) -> list[PreprocessConfig]:
        """Returns the ways in which a region is resized, the bundle's own first.

        Raises:
            ConfigError: if a canvas would be too large.
        """
        factors = FACTORS if "scale" in self.tta else ()
        sides = (round(preprocess.short_side * factor) for factor in factors)
        return [preprocess, *map(preprocess.resized, sides)]


def _places(length: int, tile: int, overlap: float) -> Places:
    """Returns where the tiles of a side lie: evenly, of one length, sharing a pixel at least."""
    if length <= tile:
        return [(0, length)]
    step = max(1, tile - ceil(tile * overlap))
    gaps = ceil((length - tile) / step)
    return [((start := i * (length - tile) // gaps), start + tile) for i in range(gaps + 1)]


@dataclass(frozen=True, slots=True)
class _View:
    """One view: a region of an image, mirrored and resized."""

    region: Region
    flips: Flips
    preprocess: PreprocessConfig

    def canvas(self) -> Size:
        """Returns the (H, W) of its canvas."""
        return padded_shape(resized_shape(_size(self.region), self.preprocess), self.preprocess)

    def prepared(self, image: Pixels) -> Prepared:
        """Puts the view on its canvas."""
        x1, y1, x2, y2 = self.region
        across, down = (-1 if flip else 1 for flip in self.flips)
        part = image[y1:y2, x1:x2][::down, ::across]
        return prepare(np.ascontiguousarray(part), self.preprocess)


@dataclass(frozen=True, slots=True)
class ViewedImage:
    """An image whose views are cut out when they run.

    Attributes:
        pixels: u8 [h, w, 3] RGB.
        views: the views. Those of one region follow each other; the first is the image as it is.
        first: the canvas of the first view.
    """

    pixels: Pixels
    views: list[_View]
    first: Prepared

    def prepared(self, view: _View) -> Prepared:
        """Puts one of the views on its canvas."""
        return self.first if view is self.views[0] else view.prepared(self.pixels)


class ViewedPredictor:
    """Runs several views of each image in the batches of a predictor, and merges what they find.

    Memory holds few canvases at a time, and of each detection the network's mask, until an image's last
    view has run.

    Args:
        predictor: runs one batch of canvases.
        views: which views run.

    Raises:
        ConfigError: if a view's canvas would be too large.
    """

    def __init__(self, predictor: FramePredictor, views: Views) -> None:
        self._predictor, self._views = predictor, views
        self._sizes = views.sizes(predictor.preprocess)

    @property
    def preprocess(self) -> PreprocessConfig:
        """The resize and padding of each view, except for other short sides."""
        return self._predictor.preprocess

    @property
    def max_batch(self) -> int:
        """The number of views of one canvas that run together."""
        return self._predictor.max_batch

    def prepare(self, image: Pixels) -> ViewedImage:
        """Plans the views of an image.

        Raises:
            ImageError: if it is not an image.
        """
        first = prepare(image, self.preprocess)
        regions = self._views.regions(first.original_size)
        ways = list(product(self._views.flips(), self._sizes))
        return ViewedImage(
            image, [_View(region, *way) for region in regions for way in ways], first
        )

    def predict_stages(self, images: Sequence[ViewedImage]) -> list[FoundAt]:
        """Returns each image's detections, by falling score, at the point `final` alone.

        Earlier points of the network have no meaning for what is merged.
        """
        planned = [(image, view) for image in images for view in image.views]
        found: dict[int, Detections] = {}
        for indices, batch in self._batches(planned):
            outputs = self._predictor.stages.run(*stacked(batch))
            found |= zip(indices, self._predictor.detections(outputs, batch), strict=True)
        in_order = map(found.__getitem__, range(len(planned)))
        return [
            {"final": _merged(image, list(islice(in_order, len(image.views))))} for image in images
        ]

    def _batches(
        self, planned: Sequence[tuple[ViewedImage, _View]]
    ) -> Iterator[tuple[list[int], list[Prepared]]]:
        """Yields batches of views of one canvas; other threads prepare the next ones meanwhile."""

        def prepared(indices: list[int]) -> list[Prepared]:
            return [image.prepared(view) for image, view in map(planned.__getitem__, indices)]

        of_canvas = batches((view.canvas() for _, view in planned), self.max_batch)
        for indices, batch in ordered_map(prepared, of_canvas):
            yield indices, batch.result()


def _merged(image: ViewedImage, found: Sequence[Detections]) -> Detections:
    """Makes one result of the detections in each view of an image."""
    by_region: dict[Region, list[tuple[Flips, Detections]]] = {}
    for view, detections in zip(image.views, found, strict=True):
        by_region.setdefault(view.region, []).append((view.flips, detections))
    of_regions = {
        region: averaged(views) if len(views) > 1 else views[0][1]
        for region, views in by_region.items()
    }
    whole, *tiles = of_regions
    if not tiles:
        return of_regions[whole]
    tile = _size(tiles[0])  # all are of one size
    scale = Placement(resized_shape(tile, image.views[0].preprocess), tile).scale[0]
    return joined(of_regions.pop(whole), of_regions, scale)


def _size(region: Region) -> Size:
    """Returns the (h, w) of a region."""
    x1, y1, x2, y2 = region
    return y2 - y1, x2 - x1
