"""Decodes, resizes and pads images for the network: the same code in training and for every backend.

Images are u8 [h, w, 3], RGB. Legend: H and W the padded canvas in pixels.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comask.config import PreprocessConfig
from comask.errors import ImageError

Pixels = NDArray[np.uint8]

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFile import ImageFile

# The forms in which a `Predictor` takes an image.
ImageLike: TypeAlias = "str | Path | PILImage | Pixels"

__all__ = [
    "Placement", "Prepared", "decode_image", "padded_shape", "prepare", "resized_shape", "rgb_from_pil",
]  # fmt: skip

# Pillow's names. The last two are optional: AVIF comes with Pillow 11.3, HEIF with pillow-heif.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "AVIF", "HEIF")
_HEIF_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"}
_TRANSPOSING = {5, 6, 7, 8}  # values of EXIF's orientation that swap width and height
# Decoding takes up to 14 bytes per pixel (RGBA), so at most 1.4 GB with this limit. A file may claim any
# size, even if it is small.
MOST_IMAGE_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class Placement:
    """The geometry of an image that lies, resized, at the top left of its canvas.

    Attributes:
        size: (h, w) of the resized image in pixels.
        original_size: (h, w) before resizing.
    """

    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Resized pixels per original pixel, as (y, x)."""
        return self.size[0] / self.original_size[0], self.size[1] / self.original_size[1]


@dataclass(frozen=True, slots=True)
class Prepared(Placement):
    """An image on its canvas.

    Attributes:
        canvas: u8 [H, W, 3], the resized image at the top left, zeros elsewhere.
    """

    canvas: Pixels


def decode_image(source: str | Path | bytes, *, name: str | None = None) -> Pixels:
    """Decodes an image to u8 [h, w, 3] RGB, with its EXIF orientation applied.

    The format is recognised by the content, not by the name. If an image has several frames, the first
    one is decoded. 16-bit gray is scaled to 8 bits; alpha is dropped.

    Args:
        source: the path of a file, or its bytes.
        name: the image's name in errors; by default the path, or "image data".

    Raises:
        ImageError: when the source is not an image, is truncated, has more than `MOST_IMAGE_PIXELS`, or
            has values of an unknown range.
    """
    from PIL import ImageOps

    with opened_image(source, name=name) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return rgb_from_pil(image)


def upright_size(source: str | Path | bytes) -> tuple[int, int]:
    """Returns the (h, w) that `decode_image` gives, nearly always from the file's header alone.

    Both ask Pillow for the orientation, which comes from EXIF, a raw profile or XMP. A PNG may state it
    after its pixels, so a PNG with texts there is decoded.

    Raises:
        ImageError: as `decode_image`, for faults that the header shows.
    """
    from PIL import ExifTags, Image
    from PIL.TiffImagePlugin import TiffImageFile

    with opened_image(source) as image:
        if image.format == "PNG" and _has_texts_behind_its_pixels(image.fp):
            image.load()
        width, height = image.size
        if isinstance(image, TiffImageFile):  # newer versions of Pillow report the rotated size
            width, height = image.tag_v2[256], image.tag_v2[257]
        # The base class's method, since the PNG class's decodes every image without EXIF.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return (width, height) if orientation in _TRANSPOSING else (height, width)


def _has_texts_behind_its_pixels(file: Any) -> bool:
    """Returns whether a PNG has chunks after its first pixels that may state an orientation."""
    place = file.tell()
    file.seek(8)
    pixels = False
    try:
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            length = int.from_bytes(head[:4], "big")
            file.seek(length + 4, io.SEEK_CUR)  # the data and the checksum
        return False
    finally:
        file.seek(place)


@contextmanager
def opened_image(source: str | Path | bytes, *, name: str | None = None) -> Iterator[ImageFile]:
    """Opens an encoded image and reads its header; the block may decode it.

    Args:
        source: the path of a file, or its bytes.
        name: the image's name in errors; by default the path, or "image data".

    Raises:
        ImageError: when the image cannot be opened, and instead of every exception of the block.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or ("image data" if isinstance(source, bytes) else str(source))
    with ExitStack() as stack:
        try:
            if source == b"":
                raise ImageError("the file is empty")
            file = io.BytesIO(source) if isinstance(source, bytes) else _opened_file(Path(source))
            stack.enter_context(file)
            # Pillow warns of oddities that it can read, and of sizes, which are checked here. Filters
            # apply to the whole process and thus to other threads, so this one names Pillow alone.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(file, formats=_readable_formats())
            if image.width * image.height > MOST_IMAGE_PIXELS:
                raise _too_large(f"{image.width}x{image.height} pixels")
            yield image
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: {_unidentified(file)}") from error
        # Pillow has its own limit, which a program may change. Only the error's text has the size.
        except Image.DecompressionBombError as error:
            sizes = re.findall(r"\d+", str(error)) or ["too many"]
            raise ImageError(f"{name}: {_too_large(f'{sizes[0]} pixels')}") from error
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error.__cause__
        # Pillow's decoders raise many types for broken data, SyntaxError and struct.error among them.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ImageError(f"{name}: cannot be decoded: {reason}") from error


def _opened_file(path: Path) -> io.BufferedReader:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise ImageError("is not a file")
        if not status.st_size:
            raise ImageError("the file is empty")
        return path.open("rb")
    except (OSError, ValueError) as error:  # a name with a zero byte raises ValueError
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be read: {reason}") from error


@cache
def _readable_formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that the installed Pillow reads."""
    from PIL import Image

    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(file: BinaryIO) -> str:
    """Says why Pillow does not recognise `file` as an image."""
    file.seek(0)
    head = file.read(12)
    known = _readable_formats()
    if head[4:8] == b"ftyp" and (brand := head[8:12]) in _HEIF_BRANDS:
        if brand.startswith(b"avi") and "AVIF" not in known:
            return "AVIF images need Pillow 11.3 or newer: pip install --upgrade pillow"
        if not brand.startswith(b"avi") and "HEIF" not in known:
            return "HEIC images need the package pillow-heif: pip install 'comask[heif]'"
    return f"not an image of a known format ({', '.join(known)})"


def _too_large(size: str) -> ImageError:
    return ImageError(
        f"{size}, but at most {MOST_IMAGE_PIXELS} are decoded: shrink the image or cut it into parts"
    )


def rgb_from_pil(image: PILImage) -> Pixels:
    """Converts a Pillow image of any mode to u8 [h, w, 3] RGB; alpha is dropped.

    Raises:
        ImageError: when the pixels are floats or exceed 16 bits, since the range of such values is
            unknown.
    """
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip these at 255 instead of scaling them. 16-bit images have the mode I;16, older
        # files the mode I.
        gray = np.asarray(image)
        if gray.dtype.kind == "f" or not 0 <= gray.min() <= gray.max() < 2**16:
            raise ImageError(
                f"gray values of mode {image.mode} from {gray.min()} to {gray.max()}: expected 8 or 16 "
                f"bits, since the range of others is unknown; convert the image"
            )
        to_8_bits = ((2 * np.arange(2**16) + 257) // (2 * 257)).astype(np.uint8)
        return np.repeat(to_8_bits[gray][:, :, None], 3, axis=2)
    # Pillow warns if an image whose palette has transparency is converted to RGB directly.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def pixels_of(image: ImageLike) -> Pixels:
    """Returns the u8 [h, w, 3] RGB pixels of a path, a Pillow image or an array.

    Raises:
        ImageError: when the image cannot be decoded, or the argument is not an image.
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, str | Path):
        return decode_image(image)
    try:
        return rgb_from_pil(image)
    except ImageError:
        raise
    # Pillow may decode a file only now, or the argument may not be an image.
    except Exception as error:
        raise ImageError(
            f"expected a path, a Pillow image or a u8 array [h, w, 3], got "
            f"{type(image).__name__}: {error}"
        ) from error


def resized_shape(size: tuple[int, int], config: PreprocessConfig) -> tuple[int, int]:
    """Returns (h, w) with a shorter side of `short_side`, or less if the longer would pass `max_side`."""
    h, w = size
    scale = min(config.short_side / min(h, w), config.max_side / max(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def padded_shape(size: tuple[int, int], config: PreprocessConfig) -> tuple[int, int]:
    """Returns (h, w) rounded up to multiples of `pad_multiple`."""
    multiple = config.pad_multiple
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def stacked(images: Sequence[Prepared]) -> tuple[Pixels, NDArray[np.int32]]:
    """Returns a batch as the graphs take it, of images on canvases of one size.

    Returns:
        `images` u8 [B, H, W, 3] and `image_sizes` i32 [B, 2], (h, w) of each image on its canvas.
    """
    canvases = np.stack([image.canvas for image in images])
    return canvases, np.array([image.size for image in images], np.int32)


def prepare(image: Pixels, config: PreprocessConfig) -> Prepared:
    """Resizes an image (bilinear, half-pixel centres, no antialiasing) and pads it right and bottom.

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
    return Prepared(size, original, canvas)
