"""Images made to do harm: they are refused by one line, in little memory, and nothing else is lost."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from PIL import Image

from comask.errors import EngineError, ImageError
from comask.preprocess import decode_image, rgb_from_pil, upright_size
from comask.runtime import Predictor
from comask.runtime.backends.base import Stages

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def png(
    width: int, height: int, *, data: bytes = b"", extra: tuple[bytes, bytes] = (b"", b"")
) -> bytes:
    """A PNG of 1-bit gray with what its header says and what `data` holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    more = chunk(*extra) if extra[0] else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, height), (279, 100)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(104)


def jpeg(exif: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG")
    body = b"Exif\0\0" + exif
    data = buffer.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def ifd(*entries: tuple[int, int, int, int]) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


def animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(PIXELS, i, 1)) for i in range(200)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


LONG = zlib.compress(bytes(64 * 2**20))
BOMBS: dict[str, tuple[bytes, str]] = {
    "png": (
        png(50_000, 50_000),
        "2500000000 pixels, but at most 100000000 are decoded: shrink the",
    ),
    "png of Pillow's warning": (png(12_000, 12_000), "12000x12000 pixels, but at most 100000000"),
    "png without end": (png(2**31 - 1, 2**31 - 1), "pixels, but at most 100000000"),
    "tiff": (tiff(60_000, 60_000), "3600000000 pixels, but at most 100000000"),
    "zTXt": (png(8, 8, data=bytes(16), extra=(b"zTXt", b"k\0\0" + LONG)), "cannot be decoded"),
    "iCCP": (png(8, 8, data=bytes(16), extra=(b"iCCP", b"k\0\0" + LONG)), "cannot be decoded"),
    "no size": (png(0, 0), "not an image"),
}
ODD: dict[str, tuple[bytes, tuple[int, int]]] = {
    "more data than pixels": (png(8, 8, data=bytes(2**26)), (8, 8)),
    "EXIF that holds itself": (jpeg(ifd((0x8769, 4, 1, 8))), (20, 30)),
    "EXIF of 4 GB": (jpeg(ifd((0x010E, 2, 2**32 - 1, 8), (0x0112, 3, 1, 6))), (30, 20)),
    "EXIF of no orientation": (jpeg(ifd((0x0112, 3, 1, 99))), (20, 30)),
    "EXIF of noise": (jpeg(bytes(range(256)) * 200), (20, 30)),
    "GIF of many frames": (animated("GIF"), (20, 30)),
    "WebP of many frames": (animated("WEBP"), (20, 30)),
    "TIFF of many frames": (animated("TIFF"), (20, 30)),
}
MEASURED = """
import resource, sys
import PIL.Image, PIL.ImageOps
from comask.preprocess import decode_image, upright_size
PIL.Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(sys.argv[1])
except ValueError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_one_line(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name][0])
    with pytest.raises(ImageError) as caught:
        decode_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert BOMBS[name][1] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize("limit", [None, 10**12, 5 * 10**7])
def test_the_limit_is_ours_whatever_pillow_s_is(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for size in (50_000, 12_000):
        (tmp_path / "bomb.png").write_bytes(png(size, size))
        for read in (decode_image, upright_size):
            with pytest.raises(ImageError, match="pixels, but at most 100000000 are decoded"):
                read(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_read_without_a_warning(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data, size = ODD[name]
    (tmp_path / "odd").write_bytes(data)
    assert decode_image(data).shape == (*size, 3)
    assert upright_size(tmp_path / "odd") == size
    assert not recwarn.list


def test_memory_of_bombs(tmp_path: Path) -> None:
    cases = [
        BOMBS["png"][0],
        BOMBS["zTXt"][0],
        ODD["more data than pixels"][0],
        ODD["EXIF of 4 GB"][0],
    ]
    for data in cases:
        (tmp_path / "bomb").write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, tmp_path / "bomb"], capture_output=True, check=True
        )
        assert int(done.stdout) < 100 * 1024, data[:60]  # KiB


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 2**36)  # bytes of zeros that no disk holds
    for path, words in [
        (tmp_path / "pipe.png", "is not a file"),
        (Path("/dev/zero"), "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "zero\0byte", "cannot be read"),
        (tmp_path / ("x" * 300), "name too long"),
        (tmp_path / "sparse.png", "not an image"),
    ]:
        with pytest.raises(ImageError, match=words):
            decode_image(path)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.float32, 0, 1), (np.float32, np.nan, 1), (np.int32, 0, 70_000), (np.int32, -1, 9)],
)
def test_gray_without_a_known_range_is_refused(dtype: type, low: float, high: float) -> None:
    gray = np.full((4, 5), high, dtype)
    gray[0, 0] = low
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "TIFF")
    with pytest.raises(ImageError, match=r"expected 8 or 16 bits"):
        decode_image(buffer.getvalue())


def test_16_bit_gray_is_rounded_to_the_nearest() -> None:
    gray = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(gray / 257 + 0.5)
    np.testing.assert_array_equal(rgb_from_pil(Image.fromarray(gray))[..., 0], expected)


def test_infer_skips_them_and_keeps_the_rest(micro_bundle: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, (data, _) in (BOMBS | ODD).items():
        (images / f"{name}.png").write_bytes(data)
    for shape in ((1, 1), (1, 10_000), (10_000, 1), (800, 20)):
        Image.new("RGB", shape).save(images / f"{shape[0]}x{shape[1]}.png")
    result = run("infer", micro_bundle, images, "--output", tmp_path / "out", "--save", "coco")
    assert result.exit_code == 1
    assert result.output.count("skipped: ") == len(BOMBS)
    found = json.loads((tmp_path / "out" / "images.json").read_text())
    assert len(found) == len(ODD) + 4
    sizes = {Path(entry["file_name"]).stem: (entry["width"], entry["height"]) for entry in found}
    assert (sizes["1x1"], sizes["1x10000"], sizes["800x20"]) == ((1, 1), (1, 10_000), (800, 20))


def broken_pillow() -> Image.Image:
    """Opened, though half of it is missing."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS.repeat(20, 0)).save(buffer, "PNG")
    data = buffer.getvalue()
    return Image.open(io.BytesIO(data[: len(data) // 2]))


def test_what_is_no_image_says_so(micro_bundle: Path) -> None:
    with Predictor.load(micro_bundle, "torch") as predictor:
        for wrong in (
            np.full((32, 32, 3), np.nan, np.float32), np.zeros((32, 32, 4), np.uint8), None, b"abc",
            broken_pillow(),
        ):  # fmt: skip
            with pytest.raises(ImageError, match="expected a") as caught:
                predictor(wrong)  # type: ignore[call-overload]
            assert "\n" not in str(caught.value)


def poisoned(stages: Stages, name: str, stage: str) -> Stages:
    """The backend with NaN in one output of one stage."""

    class Poisoned:
        def __init__(self) -> None:
            self.inner = getattr(stages, stage)

        def run(self, feeds: object, keep: object = ()) -> dict[str, np.ndarray]:
            outputs = self.inner.run(feeds)
            return outputs | {name: np.full_like(outputs[name], np.nan)}

        def close(self) -> None:
            self.inner.close()

    return dataclasses.replace(stages, **{stage: Poisoned()})


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("proposals", "stage1"),
        ("proposal_scores", "stage1"),
        ("boxes", "stage2"),
        ("masks", "stage2"),
    ],
)
def test_a_backend_that_gives_nan_is_an_error(micro_bundle: Path, name: str, stage: str) -> None:
    with Predictor.load(micro_bundle, "torch") as predictor:
        assert len(predictor(PIXELS)) > 0
        predictor.stages = poisoned(predictor.stages, name, stage)
        with pytest.raises(EngineError, match=f"stage {stage[-1]}'s {name} are not finite"):
            predictor(PIXELS)
        with predictor.stream() as session, pytest.raises(EngineError, match="not finite"):
            session.submit(PIXELS).result()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "onnxruntime:fp16"])
def test_an_overflow_inside_stage_2_is_no_empty_image(micro_fp16: Path, backend: str) -> None:
    """As TensorRT runs it: nothing looks at what goes from one stage to the other."""
    with Predictor.load(micro_fp16, backend) as predictor:
        stages = predictor.stages
        images = np.stack([predictor.prepare(PIXELS).canvas] * 2)
        sizes = np.array([predictor.prepare(PIXELS).size] * 2, np.int32)
        features = stages.stage1.run({"images": images, "image_sizes": sizes})
        clean = stages.stage2.run({**features, "image_sizes": sizes})
        assert clean["num_detections"][0] == clean["num_detections"][1] > 0
        for name in ("p2", "proposal_scores"):
            feeds = {**features, "image_sizes": sizes, name: features[name].copy()}
            feeds[name][1] = np.nan
            found = stages.stage2.run(feeds)["num_detections"]
            assert found[0] == clean["num_detections"][0], name
            assert found[1] == -1, name
        predictor.stages = poisoned(stages, "p2", "stage1")
        with pytest.raises(EngineError, match="class scores"):
            predictor(PIXELS)
