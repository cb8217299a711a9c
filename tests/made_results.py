"""Results that no network found, for the tests of their page: annotations as detections."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from video_clips import make_clip, pictures

from comask.data.coco import detections_from_coco
from comask.data.shapes import ShapesSource
from comask.data.source import InstanceSource
from comask.result_page import ResultPage
from comask.structures import Detections
from comask.timeline import Timeline

SOURCE = ShapesSource(num_images=12, seed=4)
CLASSES = [category.name for category in SOURCE.categories]
HOSTILE = "<img src=x onerror=alert(1)>\u2028</script>'\"& \u202egnp.jpg"


def detections_of(source: InstanceSource, index: int, seed: int = 0) -> Detections:
    """The annotations of an image, with random scores in 0.05..1 that fall, in hundredths."""
    entries = source.annotations(index)
    scores = np.random.default_rng((seed, index)).uniform(0.05, 1, len(entries)).round(2)
    scored = [
        entry | {"score": score}
        for entry, score in zip(entries, sorted(scores.tolist(), reverse=True), strict=True)
    ]
    return detections_from_coco(scored, source.info(index), source.categories)


def write_many(folder: Path, count: int, *, drawn: int = 20) -> Path:
    """Writes a page of `count` images, of which `drawn` differ; returns the page's path."""
    source = ShapesSource(num_images=drawn, seed=4)
    page = ResultPage(folder)
    page.start([category.name for category in source.categories], 0.5)
    first = []
    for index in range(drawn):
        name = f"photos/{index:05}.jpg"
        first.append(
            page.write_image(page.number(), name, source.image(index), detections_of(source, index))
        )
        page.add(first[-1])
    for index in range(drawn, count):
        same, number = first[index % drawn], page.number()
        for suffix in ("thumb.jpg", "view.jpg"):
            os.link(
                folder / "page" / f"{same.number:06}.{suffix}",
                folder / "page" / f"{number:06}.{suffix}",
            )
        script = (folder / "page" / f"{same.number:06}.js").read_text()
        (folder / "page" / f"{number:06}.js").write_text(
            script.replace(f"details({same.number},", f"details({number},", 1)
        )
        page.add(replace(same, number=number, name=f"photos/{index:05}.jpg"))
    return page.finish([])


def write_results(folder: Path) -> Path:
    """12 images, the second of a hostile name, and two videos, one with an overlay."""
    page = ResultPage(folder)
    page.start([HOSTILE, *CLASSES[1:]], 0.5, {"bundle": HOSTILE, "backend": "torch:fp32"})
    for index in range(len(SOURCE)):
        name = HOSTILE if index == 1 else f"photos/{index}.png"
        page.add(page.write_image(page.number(), name, SOURCE.image(index), found_in(index)))
    overlay = make_clip(folder / "clip #%.mp4.overlay.mp4", pictures(50), audio=None)
    for name, file in (("clip #%.mp4", overlay), ("rtsp://camera/live", None)):
        line = Timeline(Fraction(1, 25))
        for index in range(50):
            line.add(Fraction(index, 25), found_in(index // 10))
        page.add(page.write_video(page.number(), name, SOURCE.image(0), found_in(0), line, file))
    return page.finish([{"file": HOSTILE, "error": f"{HOSTILE}: empty"}] * 3, whole=False)


def found_in(index: int) -> Detections:
    return detections_of(SOURCE, index)


def images_where(keep: Callable[[Detections], NDArray[np.bool_]]) -> list[int]:
    """The indices of images of which `keep` chooses any instance."""
    return [index for index in range(len(SOURCE)) if keep(found_in(index)).any()]


def best_pixel(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """The pixel (x, y) of a mask that lies farthest from its edge."""
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)
