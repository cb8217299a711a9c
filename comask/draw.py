"""Draws overlays: detections on a copy of their image."""

from __future__ import annotations

import colorsys
import functools
import logging
import math
import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.errors import one_line
from comask.structures import Detections

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_NO_CHARACTER = "\U0010ffff"  # no font has it: it is drawn as the box for missing characters
_UPRIGHT = {"Regular", "Book", "Roman", "Normal", "Medium", "Text"}
_SECONDS = 10.0  # limit for fontconfig, which builds its cache on the first call

logger = logging.getLogger(__name__)
_names_without_font: list[str] = []  # the names that a warning was given for

__all__ = ["class_color", "draw_overlay"]

Color = tuple[int, int, int]

_TAG_CHARACTERS = "#0123456789. Ag|class"  # the characters of tags besides those of names
_FILL_OPACITY = 0.25  # low enough that objects keep their colours
_SMALLEST, _LARGEST = 320, 640  # bounds of a tile's sides in pixels, where whole factors allow them
_LARGEST_COVER = 0.3  # a tag hides at most this share of any box
_UNTRACKED = (160, 160, 160)
# Pairs of saturation and value. Golden-ratio hues nearly recur after a Fibonacci number of labels (8, 13,
# 21, ...). With four tones, most labels of similar hue differ in brightness.
_TONES = ((0.9, 1.0), (0.5, 1.0), (0.9, 0.65), (0.55, 0.8))


@functools.lru_cache(maxsize=4096)
def font_for(text: str, size: int) -> Font | None:
    """Returns a font that has every character of `text`, or None if this machine has no such font.

    Pillow's own font has ASCII alone. fontconfig's `fc-list`, if installed, finds the others.

    Args:
        text: one line.
        size: the font's size in pixels.
    """
    from PIL import ImageFont

    own = ImageFont.load_default(size=size)
    if has_characters(own, text):
        return own
    for file, index in _machine_fonts(frozenset(text)):
        try:
            font = ImageFont.truetype(file, size, index=index)
        except OSError:  # bitmap fonts, such as those of emoji
            continue
        if has_characters(font, text):
            return font
    return None


def has_characters(font: Font, text: str) -> bool:
    """Returns whether a font has every character of `text`, so that none is drawn as missing."""
    missing = _drawn(font, _NO_CHARACTER)
    return all(_drawn(font, c) != missing for c in set(text) if not c.isspace())


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=1024)
def _machine_fonts(characters: frozenset[str]) -> tuple[tuple[str, int], ...]:
    """Returns this machine's fonts with these characters as (file, index in the file), best first."""
    program = shutil.which("fc-list")
    if program is None:
        return ()
    charset = " ".join(f"{ord(c):x}" for c in sorted(characters) if not c.isspace())
    form = "%{file}\t%{index}\t%{style[0]}\n"
    try:
        listed = subprocess.run(
            [program, "--format", form, f":charset={charset}"],
            capture_output=True, timeout=_SECONDS, check=False,
        ).stdout.decode(errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple((file, index) for _, file, index in sorted(_ranked(listed)))


def _ranked(listed: str) -> Iterator[tuple[int, str, int]]:
    """Yields (rank, file, index) of `fc-list`'s lines; upright sans-serif fonts have the lowest rank."""
    for line in listed.splitlines():
        file, index, style = (*line.split("\t"), "", "")[:3]
        if not index.isdecimal() or int(index) >= 2**16:  # larger: instances of variable fonts
            continue
        serif = "Serif" in file or "Sans" not in file
        yield 4 * (style not in _UPRIGHT) + 2 * ("Mono" in file) + serif, file, int(index)


def class_color(label: int) -> Color:
    """Returns the (r, g, b) in 0..255 of a class or track: fixed, and unlike those of nearby labels."""
    hue = label * 0.618034 % 1
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, *_TONES[label % 4]))
    return red, green, blue


def draw_overlay(
    image: NDArray[np.uint8],
    detections: Detections,
    track_ids: NDArray[np.int64] | None = None,
    *,
    show_scores: bool = True,
) -> NDArray[np.uint8]:
    """Draws each detection's mask, contour, box and a tag with its name and score.

    Tags that would hide another tag or much of an object are left out, those of lower scores first.
    To draw some detections only, select them first: `detections[detections.scores >= 0.5]`.

    Args:
        image: [H, W, 3] u8, RGB; it is not changed.
        detections: the detections of this image; higher scores are drawn over lower ones.
        track_ids: [N] i64. Each id has its own colour and appears in the tag; detections without one
            (-1) are gray. Without track ids, each class has its own colour.
        show_scores: whether tags show scores; ground truth has no scores.

    Returns:
        [H, W, 3] u8, RGB.

    Raises:
        ValueError: when the image is not u8 RGB of the detections' size.
    """
    from PIL import Image, ImageDraw

    height, width = detections.image_size
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image: expected uint8 {(height, width, 3)}, the detections' size, "
            f"got {image.dtype} {image.shape}"
        )
    # The font grows less than the image: viewers scale large pictures down, but not to one size.
    font_size = max(9, round(14 * (min(height, width) / 480) ** 0.75))
    line = max(1, round(font_size / 13))
    # Coordinates that are not finite must not stop the other detections from being drawn.
    corners = np.nan_to_num(detections.boxes_xyxy.astype(np.float64))
    boxes = corners.clip(0, [width, height, width, height]).round().astype(int)
    order = np.argsort(detections.scores, kind="stable")

    canvas = image.copy(order="C")
    keys = detections.labels if track_ids is None else track_ids
    colors = [class_color(key) if key >= 0 else _UNTRACKED for key in keys.tolist()]
    for index in order:
        _draw_instance(canvas, detections, index, boxes[index], colors[index], line)

    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    tags = np.empty((0, 4), np.int64)
    for index in order[::-1]:  # higher scores choose their place first
        text, font = _name_and_font(detections, int(detections.labels[index]), font_size)
        if show_scores:
            text += f" {detections.scores[index]:.2f}"
        if track_ids is not None and track_ids[index] >= 0:
            text = f"#{track_ids[index]} {text}"
        place = _tag_place(_tag_size(font, text), boxes[index], boxes, tags, (height, width))
        if place is not None:
            _draw_tag(pen, font, text, colors[index], place)
            tags = np.vstack((tags, place))
    return np.array(picture)


def draw_tile(
    image: NDArray[np.uint8], detections: Detections, *, show_scores: bool = True
) -> NDArray[np.uint8]:
    """Draws an overlay of a legible size: small images are enlarged, large ones scaled down.

    Drawing follows scaling, so that lines and tags keep their size and masks follow their boxes.
    """
    import cv2

    height, width = detections.image_size
    scale = _scale(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    interpolation = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    scaled = np.asarray(cv2.resize(image, size[::-1], interpolation=interpolation), np.uint8)
    return draw_overlay(scaled, detections.resized(size), show_scores=show_scores)


def _scale(height: int, width: int) -> float:
    """Returns a whole factor for small images, which keeps their pixels square, else at most 1."""
    if width < _SMALLEST and height < _LARGEST:
        return max(1, min(math.ceil(_SMALLEST / width), _LARGEST // height))
    return min(1.0, _LARGEST / width, _LARGEST / height)


def _draw_instance(
    canvas: NDArray[np.uint8],
    detections: Detections,
    index: int,
    box: NDArray[np.int64],
    color: Color,
    line: int,
) -> None:
    """Draws one instance's fill, contour and box into `canvas`."""
    import cv2

    x0, y0, crop = detections.crop(int(index))
    if not crop.size:
        return
    region = canvas[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]]
    tint = np.full_like(region, color)
    blended = cv2.addWeighted(region, 1 - _FILL_OPACITY, tint, _FILL_OPACITY, 0)
    np.copyto(region, blended, where=crop[..., None])
    x1, y1, x2, y2 = box.tolist()
    cv2.rectangle(canvas, (x1, y1), (max(x2 - 1, x1), max(y2 - 1, y1)), color, line)
    outline, _ = cv2.findContours(crop.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # An edge of the opposite brightness makes the contour visible on a background of its colour.
    for edge, thickness in ((_ink(color), line + (line + 1) // 2), (color, line)):
        cv2.drawContours(canvas, outline, -1, edge, thickness, cv2.LINE_AA, offset=(x0, y0))


def _name_and_font(detections: Detections, label: int, size: int) -> tuple[str, Font]:
    """Returns a class's text in a tag and its font: its name, or its number if no font has the name."""
    name = one_line(detections.name(label))
    font = font_for(name + _TAG_CHARACTERS, size)
    if font is None:
        _warn_without_font(name)
        name, font = f"class {label}", font_for(_TAG_CHARACTERS, size)
        assert font is not None  # Pillow's own font has ASCII
    return name, font


def _warn_without_font(name: str) -> None:
    """Warns once per process, with the first such name."""
    if _names_without_font:
        return
    _names_without_font.append(name)
    logger.warning(
        "warning: no font here can show the class name %s: overlays show class numbers in place of such "
        "names; install fontconfig and a font that has them, such as Noto's",
        name,
    )


def _tag_size(font: Font, text: str) -> tuple[int, int]:
    """Returns a tag's (width, height) in pixels, margins included; the height depends on the font."""
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox(f"{text}Ag|")
    return round(right - left) + 5, round(bottom - top) + 2


def _tag_place(
    tag_size: tuple[int, int],
    box: NDArray[np.int64],
    boxes: NDArray[np.int64],
    tags: NDArray[np.int64],
    image_size: tuple[int, int],
) -> NDArray[np.int64] | None:
    """Returns a place [4] for a tag beside or in `box`, clear of `boxes` and `tags`, or None."""
    (width, height), (x1, y1, x2, y2) = tag_size, box.tolist()
    above, below = y1 - height, y2
    places = [(x1, above), (x2 - width, above), (x1, below), (x2 - width, below)]
    for x, y in [*places, (x1, y1), (x2, y1), (x1 - width, y1)]:
        x = max(0, min(x, image_size[1] - width))
        y = max(0, min(y, image_size[0] - height))
        tag = np.array([x, y, x + width, y + height])
        if not _cover(tag, tags).any() and (_cover(tag, boxes) <= _LARGEST_COVER).all():
            return tag
    return None


def _cover(tag: NDArray[np.int64], boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns [N] f64, the share in 0..1 of each of `boxes` ([N, 4]) that `tag` ([4]) covers."""
    shared = np.minimum(tag[2:], boxes[:, 2:]) - np.maximum(tag[:2], boxes[:, :2])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    cover: NDArray[np.float64] = shared.clip(0).prod(axis=1) / areas.clip(1)
    return cover


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    font: Font,
    text: str,
    color: Color,
    place: NDArray[np.int64],
) -> None:
    x1, y1, x2, y2 = place.tolist()
    pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    left, top, _, _ = font.getbbox(f"{text}Ag|")
    pen.text((x1 + 2 - left, y1 + 1 - top), text, fill=_ink(color), font=font)


def _ink(color: Color) -> Color:
    """Returns black or white, whichever is more legible on `color`, by the luma of ITU-R BT.601."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)
