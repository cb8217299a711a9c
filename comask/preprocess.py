"""From a file to the network's input: decode, resize, pad. One code for training and every backend.

Images are u8 [h, w, 3], RGB. Legend: H and W the padded canvas in pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image on its canvas.

    Attributes:
        canvas: u8 [H, W, 3], the resized image at the top left, zeros elsewhere.
        size: (h, w) of the resized image in pixels.
        original_size: (h, w) before resizing.
    """

    canvas: Pixels
    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """(y, x): resized pixels an original pixel."""
        return self.size[0] / self.original_size[0], self.size[1] / self.original_size[1]


def decode_image(source: str | Path | bytes) -> Pixels:
    """An encoded image as u8 [h, w, 3] RGB, EXIF orientation applied, its first frame if several.

    The format is known by its content, not its name. 16-bit gray is scaled to 8 bits; alpha is
    dropped.

    Raises:
        ImageError: when it cannot be read whole: not an image, truncated, or beyond Pillow's limit
            of pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = "image data" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image of a known format ({', '.join(FORMATS)})"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more than {Image.MAX_IMAGE_PIXELS} pixels: {error}") from error
    # Pillow's decoders raise many kinds on broken data, SyntaxError and struct.error among them.
    except Exception as error:
        raise ImageError(f"{name}: cannot be decoded: {error}") from error
    return rgb_from_pil(upright)


def rgb_from_pil(image: PILImage) -> Pixels:
    """Any Pillow mode as u8 [h, w, 3] RGB; alpha is dropped."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these at 255 instead of scaling. Its 16-bit modes are I;16 or, for older files, I.
        gray = np.asarray(image, dtype=np.float64)
        gray8 = np.clip(gray / 257.0 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(gray8[:, :, None], 3, axis=2)
    # A palette may hold transparency that a direct conversion to RGB warns about.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def resized_shape(size: tuple[int, int], config: PreprocessConfig) -> tuple[int, int]:
    """(h, w) with the shorter side at `short_side` unless the longer one would pass `max_side`."""
    h, w = size
    scale = min(config.short_side / min(h, w), config.max_side / max(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def padded_shape(size: tuple[int, int], config: PreprocessConfig) -> tuple[int, int]:
    """(h, w) rounded up to `pad_multiple`."""
    multiple = config.pad_multiple
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def prepare(image: Pixels, config: PreprocessConfig) -> Prepared:
    """Resizes (bilinear, half-pixel centres, no antialiasing) and pads right and bottom.

    Raises:
        ImageError: when `image` is not u8 [h, w, 3] with at least one pixel.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(f"expected a u8 array [h, w, 3], got {image.dtype} {list(image.shape)}")
    import cv2

    original = (image.shape[0], image.shape[1])
    size = resized_shape(original, config)
    canvas = np.zeros((*padded_shape(size, config), 3), dtype=np.uint8)
    if size != original:
        resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        canvas[: size[0], : size[1]] = resized
    else:
        canvas[: size[0], : size[1]] = image
    return Prepared(canvas, size, original)
