"""Draws the detections of a bundle in twelve synthetic images, enlarged, on one sheet.

Run it with:

python examples/contact_sheet.py demo/bundle sheet.png
"""

from __future__ import annotations

import argparse
import sys

import cv2
import numpy as np
from PIL import Image

from comask.data.shapes import ShapesSource
from comask.draw import draw_overlay
from comask.errors import ComaskError
from comask.runtime import Detections, Predictor

COLUMNS, ROWS, SCALE, SEED = 4, 3, 3, 42


def enlarge(image: np.ndarray, detections: Detections) -> np.ndarray:
    """Returns the overlay at SCALE times the image's size; masks scale with their boxes."""
    h, w = image.shape[:2]
    large = cv2.resize(image, (w * SCALE, h * SCALE), interpolation=cv2.INTER_NEAREST)
    scaled = detections.resized((h * SCALE, w * SCALE))
    return draw_overlay(large, scaled[scaled.scores >= 0.5])


def main() -> None:
    """Runs the bundle and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("output", help="the image file to write")
    asked = parser.parse_args()
    source = ShapesSource(num_images=200, seed=SEED)
    landscape = [i for i in range(len(source)) if source.info(i).width > source.info(i).height]
    images = [source.image(i) for i in landscape[: COLUMNS * ROWS]]
    with Predictor.load(asked.bundle) as predictor:
        tiles = [enlarge(*pair) for pair in zip(images, predictor(images), strict=True)]
    rows = [np.hstack(tiles[row * COLUMNS : (row + 1) * COLUMNS]) for row in range(ROWS)]
    Image.fromarray(np.vstack(rows)).save(asked.output)


if __name__ == "__main__":
    try:
        main()
    except (ComaskError, OSError) as error:
        sys.exit(f"error: {error}")
