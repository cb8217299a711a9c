"""Decoding and resizing: odd files as their README expects, geometry by properties."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comask.config import PreprocessConfig
from comask.errors import ImageError
from comask.preprocess import decode_image, padded_shape, prepare, resized_shape

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
    with pytest.raises(ImageError, match="100x100 pixels, and at most 6000 are decoded"):
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
