"""Decoding and resizing: odd files as their README expects, geometry by properties."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.preprocess import decode_image, padded_shape, prepare, resized_shape, upright_size

PAPER = PreprocessConfig()
SIZES = {  # (h, w) after decoding; None: must fail
    "aspect_tall_made_000000520707.jpg": (480, 12),
    "aspect_wide_made_000000520707.jpg": (16, 640),
    "cmyk_made_000000519208.jpg": (406, 640),
    "cmyk_pil_sample.jpg": (100, 100),
    "exif5_portrait_mirrored.jpg": (1800, 1200),
    "exif6_landscape.jpg": (1200, 1800),
    "exif6_made_000000520707.jpg": (480, 640),
    "exif8_portrait.jpg": (1800, 1200),
    "gray_000000274219.jpg": (640, 464),
    "one_pixel.png": (1, 1),
    "png16_basn0g16.png": (32, 32),
    "png16_basn2c16.png": (32, 32),
    "png16_basn6a16.png": (32, 32),
    "png_named_000000418281.jpg": (214, 320),
    "rgba_toucan.png": (150, 162),
    "truncated_half_000000519208.jpg": None,
    "truncated_header_000000519208.jpg": None,
    "zero_byte.jpg": None,
    "text_named.jpg": None,
}


@pytest.mark.parametrize("name", SIZES)
def test_odd_files_load_or_say_why(shared_data: Path, name: str) -> None:
    path = shared_data / "odd" / name
    if SIZES[name] is None:
        with pytest.raises(ImageError, match=name):
            decode_image(path)
    else:
        image = decode_image(path)
        assert image.dtype == np.uint8
        assert image.shape == (*SIZES[name], 3)


@pytest.mark.parametrize(
    ("odd", "original"),
    [
        ("cmyk_made_000000519208.jpg", "000000519208.jpg"),
        ("exif6_made_000000520707.jpg", "000000520707.jpg"),
        ("palette_made_000000165518.png", "000000165518.jpg"),
        ("png16_rgb_made_000000165518.png", "000000165518.jpg"),
        ("rgba_made_000000165518.png", "000000165518.jpg"),
    ],
)
def test_odd_files_show_their_original(shared_data: Path, odd: str, original: str) -> None:
    made = decode_image(shared_data / "odd" / odd).astype(float)
    plain = decode_image(shared_data / "coco_dev" / "images" / original).astype(float)
    # they differ by compression, and the palette by its 256 colours; the wrong way up it is below 0.5
    assert np.corrcoef(made.ravel(), plain.ravel())[0, 1] > 0.99


def test_16_bit_gray_is_scaled_not_clipped(shared_data: Path) -> None:
    gray = decode_image(shared_data / "odd" / "png16_gray_made_000000165518.png")
    plain = shared_data / "coco_dev" / "images" / "000000165518.jpg"
    expected = np.asarray(Image.open(plain).convert("L")).astype(float)
    assert np.abs(gray[..., 0] - expected).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_formats_are_known_by_content(kind: str) -> None:
    image = Image.fromarray(np.full((5, 7, 3), 120, np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    decoded = decode_image(buffer.getvalue())
    assert decoded.shape == (5, 7, 3)
    assert np.abs(decoded.astype(int) - 120).max() <= 3


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr("comask.preprocess.MOST_IMAGE_PIXELS", 60 * 100)
    with pytest.raises(ImageError, match="100x100 pixels, but at most 6000 are decoded"):
        decode_image(path)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_resize_keeps_the_sides_in_bounds(h: int, w: int) -> None:
    new_h, new_w = resized_shape((h, w), PAPER)
    assert max(new_h, new_w) <= 1333
    assert min(new_h, new_w) <= 800
    assert min(new_h, new_w) == 800 or max(new_h, new_w) == 1333
    canvas = padded_shape((new_h, new_w), PAPER)
    for padded, side in zip(canvas, (new_h, new_w), strict=True):
        assert padded % 32 == 0
        assert 0 <= padded - side < 32


def test_resize_is_bilinear_at_half_pixels_without_antialiasing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    config = PreprocessConfig(short_side=40, max_side=1000)
    prepared = prepare(image, config)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(planes, size=prepared.size, mode="bilinear", align_corners=False)
    found = prepared.canvas[: prepared.size[0], : prepared.size[1]].astype(float)
    # OpenCV computes in 11-bit fixed point
    assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() <= 1


def test_padding_is_zero_and_scale_leads_back() -> None:
    prepared = prepare(
        np.full((50, 70, 3), 255, np.uint8), PreprocessConfig(short_side=100, max_side=500)
    )
    assert prepared.size == (100, 140)
    assert prepared.canvas.shape == (128, 160, 3)
    assert prepared.canvas[100:].max() == prepared.canvas[:, 140:].max() == 0
    assert prepared.canvas[:100, :140].min() == 255
    assert prepared.scale == (2.0, 2.0)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)),
              np.zeros((0, 4, 3), np.uint8)]
)  # fmt: skip
def test_wrong_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"u8 array \[h, w, 3\]"):
        prepare(image, PAPER)


def exif_of(orientation: int) -> bytes:
    """A TIFF header and one entry, as EXIF begins."""
    entry = struct.pack("<HHII", 0x112, 3, 1, orientation)
    return b"II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def xmp_of(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_profile(orientation: int) -> bytes:
    """As ImageMagick writes EXIF into a text of a PNG."""
    exif = b"Exif\0\0" + exif_of(orientation)
    body = f"\nexif\n{len(exif):8}\n{exif.hex()}\n"
    return b"Raw profile type exif\0\0" + zlib.compress(body.encode())


PNG_WAYS = {
    "eXIf": lambda orientation: png_chunk(b"eXIf", exif_of(orientation)),
    "raw profile": lambda orientation: png_chunk(b"zTXt", raw_profile(orientation)),
    "XMP": lambda orientation: png_chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(orientation)
    ),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", PNG_WAYS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_and_the_decoder_agree_on_a_png_s_orientation(
    way: str, late: bool, orientation: int
) -> None:
    file = io.BytesIO()
    pixels = np.zeros((2, 5, 3), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(file, "PNG")
    plain, chunk = file.getvalue(), PNG_WAYS[way](orientation)
    place = plain.rindex(b"IEND") - 4 if late else plain.index(b"IDAT") - 4
    content = plain[:place] + chunk + plain[place:]
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_image(content), expected)
    assert upright_size(content) == expected.shape[:2] == ((5, 2) if orientation > 4 else (2, 5))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF", "AVIF", "JPEG2000", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_and_the_decoder_agree_on_every_format(form: str, orientation: int) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if form == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (50, 20)).save(file, form, exif=exif)
    content = file.getvalue()
    assert upright_size(content) == decode_image(content).shape[:2]
