"""Sheets of ground truth beside predictions: what the numbers of an evaluation look like."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comask.data.source import Category, ImageInfo, InstanceSource
from comask.draw import draw_tile
from comask.fonts import font_for
from comask.segmentation import read_segmentation
from comask.structures import Detections
from comask.whole_file import write_whole

if TYPE_CHECKING:
    from comask.fonts import Font

TRUE_MASK_SIZE = 112  # four times as fine as a prediction's
_GAP, _LINE, _FONT_SIZE = 8, 24, 15  # between tiles, height of a line of text, its size
_PAPER, _INK = (250, 250, 250), (32, 32, 32)
_ONE_COLUMN = 3  # more images than these stand in two columns


def picture_grid(
    source: InstanceSource,
    indices: list[int],
    detections: list[Detections],
    path: Path,
    *,
    threshold: float = 0.5,
) -> None:
    """Writes a PNG of images, each drawn twice: with its ground truth and with predictions.

    Args:
        source: with images and ground truth.
        indices: which images; without any, nothing is written.
        detections: predictions in the order of `indices`, in pixels of their images, with labels of
            `source`.
        path: of the PNG, replaced as a whole.
        threshold: predictions of lower scores are not drawn.

    Raises:
        ValueError: when there are not as many detections as images.
        DataError: when an annotation cannot be used.
        ImageError: when an image cannot be decoded.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
    names = tuple(category.name for category in source.categories)
    for index, found in zip(indices, detections, strict=True):
        image, info = source.image(index), source.info(index)
        shown = dataclasses.replace(found[found.scores >= threshold], class_names=names)
        truth = draw_tile(image, true_detections(source, index), show_scores=False)
        tiles = [truth, draw_tile(image, shown)]
        rows.append((info.file_name or str(info.id), tiles))
    if not rows:
        return
    columns = 2 if len(rows) > _ONE_COLUMN else 1
    width = max(tiles[0].shape[1] for _, tiles in rows)
    pair = 2 * (width + _GAP)
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    heights = [max(tiles[0].shape[0] for _, tiles in line) for line in lines]
    size = (columns * (pair + _GAP), _LINE + sum(heights) + len(lines) * (_LINE + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen, own_font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_SIZE)
    for column in range(columns):
        # ASCII: Pillow's own font has no ≥ and no ellipsis.
        for side, caption in enumerate(
            ("ground truth", f"predictions of score >= {threshold:.2f}")
        ):
            x = _GAP + column * (pair + _GAP) + side * (width + _GAP)
            pen.text((x, 3), caption, _INK, own_font)
    y = _LINE
    for line, height in zip(lines, heights, strict=True):
        for column, (name, tiles) in enumerate(line):
            x = _GAP + column * (pair + _GAP)
            font = font_for(f"{name}...", _FONT_SIZE) or own_font
            pen.text((x, y + 3), _shortened(name, font, pair - _GAP), _INK, font)
            for side, tile in enumerate(tiles):
                sheet.paste(Image.fromarray(tile), (x + side * (width + _GAP), y + _LINE))
        y += _LINE + height + _GAP
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_whole(path, content.getvalue())


def true_detections(source: InstanceSource, index: int) -> Detections:
    """The objects of image `index`, as `detections_from_coco` makes them."""
    return detections_from_coco(source.annotations(index), source.info(index), source.categories)


def detections_from_coco(
    entries: Sequence[Mapping[str, Any]], info: ImageInfo, categories: Sequence[Category]
) -> Detections:
    """COCO annotations or results of one image, crowds and empty boxes left out.

    Boxes are widened to whole pixels inside the image; masks are finer than those of predictions,
    [N, TRUE_MASK_SIZE, TRUE_MASK_SIZE]. Scores are 1 where there are none.

    Args:
        entries: each with `category_id`, `bbox`, `segmentation` and, of results, `score`.
        info: of the image.
        categories: in label order.

    Raises:
        DataError: when a segmentation cannot be used.
    """
    import cv2

    label_of = {category.id: label for label, category in enumerate(categories)}
    boxes, scores, labels, masks = [], [], [], []
    for annotation in entries:
        x, y, w, h = annotation["bbox"]
        x1, y1 = max(0, math.floor(x)), max(0, math.floor(y))
        x2, y2 = min(info.width, math.ceil(x + w)), min(info.height, math.ceil(y + h))
        if annotation.get("iscrowd") or w <= 0 or h <= 0 or x2 <= x1 or y2 <= y1:
            continue
        mask = read_segmentation(annotation["segmentation"], info.height, info.width)
        crop = mask.part(x1, y1, x2, y2).astype(np.float32)
        # Means of pixels where it shrinks; where it grows, it only repeats them.
        masks.append(cv2.resize(crop, (TRUE_MASK_SIZE,) * 2, interpolation=cv2.INTER_AREA))
        boxes.append((x1, y1, x2, y2))
        labels.append(label_of[annotation["category_id"]])
        scores.append(annotation.get("score", 1.0))
    return Detections(
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        mask_probs=np.array(masks, np.float32).reshape(-1, TRUE_MASK_SIZE, TRUE_MASK_SIZE),
        image_size=(info.height, info.width),
        class_names=tuple(category.name for category in categories),
    )


def _shortened(text: str, font: Font, width: int) -> str:
    """`text` on one line, its end cut off where it is wider than `width` pixels."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
