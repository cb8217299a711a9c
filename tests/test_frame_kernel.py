"""Frames to canvases, on the CPU: RGB against `prepare`, NV12 against its formula, OpenCV and FFmpeg."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import FEW, seeds

from comask.config import PreprocessConfig
from comask.errors import KernelError
from comask.kernels import compile, launch
from comask.kernels.launch import Launch, nv12_to_canvas_launch, rgb_to_canvas_launch
from comask.kernels.run import on_host
from comask.preprocess import padded_shape, prepare, resized_shape

LENGTHS = st.integers(1, 40)
LAYOUTS = st.sampled_from(["packed", "planar"])
MATRICES = ("bt601", "bt709", "bt2020")
# Rows of Y, U, V → R, G, B, as each standard prints them for full range (BT.601 and BT.709: also in
# IEC 61966-2-4; BT.2020: its table 4), rounded to four places.
FULL_RANGE = {
    "bt601": [[1, 0, 1.402], [1, -0.3441, -0.7141], [1, 1.772, 0]],
    "bt709": [[1, 0, 1.5748], [1, -0.1873, -0.4681], [1, 1.8556, 0]],
    "bt2020": [[1, 0, 1.4746], [1, -0.1646, -0.5714], [1, 1.8814, 0]],
}


def run(launch: Launch, inputs: list[int], threads: int = 1, shift: int = 0) -> np.ndarray:
    """The canvas, `shift` bytes past an aligned address, between bytes that must not change."""
    height, width = launch.integers[4:6]
    length = height * width * 3
    memory = np.full(length + 512, 7, np.uint8)
    begin = 192 + shift + -memory.ctypes.data % 64
    on_host(launch, inputs, memory[begin:].ctypes.data, threads)
    assert (memory[:begin] == 7).all()
    assert (memory[begin + length :] == 7).all()
    return memory[begin : begin + length].reshape(height, width, 3)


def rgb_canvas(frame: np.ndarray, config: PreprocessConfig, **order: Any) -> np.ndarray:
    """Returns the kernel's canvas for a view [h, w, 3] with any strides."""
    size = (frame.shape[0], frame.shape[1])
    resized = resized_shape(size, config)
    canvas = padded_shape(resized, config)
    launch = rgb_to_canvas_launch(size, frame.strides, resized, canvas, **order)  # type: ignore[arg-type]
    return run(launch, [frame.ctypes.data])


def laid_out(image: np.ndarray, layout: str, padding: int) -> np.ndarray:
    """The same pixels as a view into memory of that layout with `padding` bytes behind each row."""
    height, width = image.shape[:2]
    if layout == "packed":
        memory = np.full((height, width * 3 + padding), 255, np.uint8)
        view = memory[:, : width * 3].reshape(height, width, 3)
        view = np.lib.stride_tricks.as_strided(memory, view.shape, (memory.strides[0], 3, 1))
    else:
        planes = np.full((3, height, width + padding), 255, np.uint8)
        view = planes[:, :, :width].transpose(1, 2, 0)
    view[...] = image
    return view


@FEW
@given(
    height=LENGTHS, width=LENGTHS, short=st.integers(1, 60), stretch=st.integers(1, 4),
    multiple=st.sampled_from([32, 64]), layout=LAYOUTS, padding=st.integers(0, 5), seed=seeds,
)  # fmt: skip
@example(1, 1, 50, 2, 32, "packed", 0, 0)
@example(40, 1, 60, 4, 32, "planar", 3, 0)  # 40:1
@example(1, 40, 1, 4, 32, "packed", 1, 0)
@example(20, 30, 10, 4, 32, "planar", 0, 0)  # halved, where OpenCV averages areas
@example(20, 30, 20, 4, 64, "packed", 0, 0)  # as it is
@example(11, 13, 60, 4, 32, "packed", 0, 0)  # larger
def test_rgb_is_the_canvas_of_prepare(
    height: int, width: int, short: int, stretch: int, multiple: int, layout: str, padding: int,
    seed: int,
) -> None:  # fmt: skip
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    config = PreprocessConfig(short_side=short, max_side=short * stretch, pad_multiple=multiple)
    expected = prepare(image, config).canvas
    rgb = rgb_canvas(laid_out(image, layout, padding), config)
    bgr = rgb_canvas(laid_out(image[..., ::-1], layout, padding), config, order="bgr")
    backwards = rgb_canvas(
        laid_out(image[::-1, ::-1, ::-1], layout, padding)[::-1, ::-1, ::-1], config
    )
    for ours in (rgb, bgr, backwards):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (719, 405), (25, 1000)])
def test_rgb_at_the_papers_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = prepare(image, PreprocessConfig())
    np.testing.assert_array_equal(rgb_canvas(image, PreprocessConfig()), expected.canvas)
    launch = rgb_to_canvas_launch(size, image.strides, expected.size, expected.canvas.shape[:2])
    np.testing.assert_array_equal(run(launch, [image.ctypes.data], threads=2), expected.canvas)


def nv12_canvas(
    luma: np.ndarray, chroma: np.ndarray, resized: tuple[int, int] | None = None, *,
    matrix: Any = "bt709", full_range: bool = False,
) -> np.ndarray:  # fmt: skip
    """Of [h, w] and [ch, cw, 2], views into rows of any pitch; as large as the frame if not `resized`."""
    size = (luma.shape[0], luma.shape[1])
    launch = nv12_to_canvas_launch(
        size, chroma.shape[:2], (luma.strides[0], chroma.strides[0]), resized or size,
        resized or size, matrix=matrix, full_range=full_range,
    )  # fmt: skip
    return run(launch, [luma.ctypes.data, chroma.ctypes.data])


def nv12(
    height: int, width: int, seed: int, *, floor: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Noise of Y and UV, whose rows have different pitches."""
    rng = np.random.default_rng(seed)
    up = 0 if floor else 1
    rows, columns = (height + up) // 2, (width + up) // 2
    luma = rng.integers(0, 256, (height, width + 5), np.uint8)[:, :width]
    chroma = rng.integers(0, 256, (rows, columns + 2, 2), np.uint8)[:, :columns]
    return luma, chroma


def formula(luma: np.ndarray, chroma: np.ndarray, matrix: str, full_range: bool) -> np.ndarray:
    """[h, w, 3] f64, not rounded, in 0..255."""
    rows = np.minimum(np.arange(luma.shape[0]) // 2, chroma.shape[0] - 1)
    columns = np.minimum(np.arange(luma.shape[1]) // 2, chroma.shape[1] - 1)
    uv = chroma[rows[:, None], columns].astype(float) - 128
    y = luma.astype(float)[..., None]
    if not full_range:
        y, uv = (y - 16) * 255 / 219, uv * 255 / 224
    yuv = np.concatenate((y, uv), axis=2)
    return np.clip(yuv @ np.array(FULL_RANGE[matrix], float).T, 0, 255)


@FEW
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), matrix=st.sampled_from(MATRICES),
    full_range=st.booleans(), floor=st.booleans(), seed=seeds,
)  # fmt: skip
@example(1, 1, "bt601", False, False, 0)
@example(9, 7, "bt2020", True, True, 0)
def test_nv12_is_the_standards_formula(
    height: int, width: int, matrix: str, full_range: bool, floor: bool, seed: int
) -> None:
    luma, chroma = nv12(height, width, seed, floor=floor and min(height, width) > 1)
    ours = nv12_canvas(luma, chroma, matrix=matrix, full_range=full_range)
    expected = formula(luma, chroma, matrix, full_range)
    # half a level of rounding, and the printed matrices' four places
    assert np.abs(ours - expected).max() <= 0.5 + 3 * 128 * 0.5e-4


def test_nv12_is_within_a_level_of_opencvs() -> None:
    luma, chroma = nv12(64, 96, 0)
    luma = np.maximum(luma, 16)  # it takes what is blacker than black for black
    theirs = cv2.cvtColorTwoPlane(luma, chroma.copy(), cv2.COLOR_YUV2RGB_NV12)
    ours = nv12_canvas(luma, chroma, matrix="bt601")
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [(64, 96), (34, 51)])  # of odd heights swscale interpolates chroma
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_nv12_is_near_ffmpegs(matrix: str, full_range: bool, size: tuple[int, int]) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    luma, chroma = nv12(*size, 1)
    frame = av.VideoFrame(size[1], size[0], "yuv420p")  # what decoders on a CPU give
    for plane, rows in zip(frame.planes, (luma, chroma[..., 0], chroma[..., 1]), strict=True):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:, : rows.shape[1]] = rows
        plane.update(padded)
    colours = {"bt601": "ITU601", "bt709": "ITU709"}[matrix]
    theirs = frame.reformat(
        format="rgb24", src_colorspace=colours, dst_colorspace=colours,
        src_color_range="JPEG" if full_range else "MPEG", dst_color_range="JPEG",
    ).to_ndarray()  # fmt: skip
    ours = nv12_canvas(luma, chroma, matrix=matrix, full_range=full_range)
    # swscale adds up tables of its own that cut off instead of rounding
    assert np.abs(ours.astype(int) - theirs).max() <= 3


@FEW
@given(
    height=st.integers(2, 40), width=st.integers(2, 40), to_height=st.integers(1, 60),
    to_width=st.integers(1, 60), seed=seeds,
)  # fmt: skip
def test_nv12_is_resized_as_its_rgb_would_be(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    luma, chroma = nv12(height, width, seed)
    converted = nv12_canvas(luma, chroma)
    ours = nv12_canvas(luma, chroma, (to_height, to_width))
    expected = cv2.resize(converted, (to_width, to_height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(ours, expected)


def converted(luma: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """u8 RGB [h, w, 3] by the launch's coefficients for BT.709, limited range."""
    rows = np.minimum(np.arange(luma.shape[0]) // 2, chroma.shape[0] - 1)
    columns = np.minimum(np.arange(luma.shape[1]) // 2, chroma.shape[1] - 1)
    u, v = np.moveaxis(chroma[rows[:, None], columns].astype(int) - 128, 2, 0)
    black, gain, red_v, green_u, green_v, blue_u = launch.colour_coefficients(
        "bt709", full_range=False
    )
    y = (luma.astype(int) - black) * gain + 2 ** (launch.COLOUR_SHIFT - 1)
    rgb = np.stack((y + red_v * v, y + green_u * u + green_v * v, y + blue_u * u), axis=2)
    return np.clip(rgb >> launch.COLOUR_SHIFT, 0, 255).astype(np.uint8)


@FEW
@given(
    size=st.tuples(LENGTHS, LENGTHS), resized=st.tuples(st.integers(1, 40), st.integers(1, 290)),
    padding=st.tuples(st.integers(0, 40), st.integers(0, 140)), shift=st.integers(0, 15),
    chroma_shift=st.integers(0, 3), chroma_padding=st.integers(0, 3), backwards=st.booleans(),
    threads=st.integers(1, 3), seed=seeds,
)  # fmt: skip
@example((9, 11), (33, 270), (0, 1), 0, 1, 0, False, 1, 0)  # several tiles, none whole
@example((9, 11), (32, 256), (0, 0), 0, 0, 0, False, 2, 0)  # whole tiles alone, in words
@example((9, 11), (1, 1), (40, 140), 1, 0, 0, True, 1, 0)  # tiles of padding
def test_canvases_of_any_width_at_any_address(
    size: tuple[int, int], resized: tuple[int, int], padding: tuple[int, int], shift: int,
    chroma_shift: int, chroma_padding: int, backwards: bool, threads: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    canvas = (resized[0] + padding[0], resized[1] + padding[1])
    pairs = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    luma = rng.integers(0, 256, size, np.uint8)
    pitch = 2 * pairs[1] + chroma_padding  # may be odd, as may the address
    planes = rng.integers(0, 256, chroma_shift + pairs[0] * pitch, np.uint8)[chroma_shift:]
    chroma = np.lib.stride_tricks.as_strided(planes, (*pairs, 2), (pitch, 2, 1))
    rgb = converted(luma, chroma)

    def expected(image: np.ndarray) -> np.ndarray:
        small = cv2.resize(image, resized[::-1], interpolation=cv2.INTER_LINEAR)
        return np.pad(small, ((0, padding[0]), (0, padding[1]), (0, 0)))

    launch = nv12_to_canvas_launch(
        size, pairs, (size[1], pitch), resized, canvas, matrix="bt709", full_range=False
    )
    ours = run(launch, [luma.ctypes.data, planes.ctypes.data], threads, shift)
    np.testing.assert_array_equal(ours, expected(rgb))
    view = rgb[::-1, ::-1, ::-1] if backwards else rgb
    launch = rgb_to_canvas_launch(size, view.strides, resized, canvas)  # type: ignore[arg-type]
    ours = run(launch, [view.ctypes.data], threads, shift)
    np.testing.assert_array_equal(ours, expected(np.ascontiguousarray(view)))


def test_grey_is_grey_and_black_is_black() -> None:
    chroma = np.full((1, 1, 2), 128, np.uint8)
    for matrix in MATRICES:
        limited = [nv12_canvas(np.full((2, 2), y, np.uint8), chroma, matrix=matrix).max(axis=(0, 1))
                   for y in (0, 16, 235, 255)]  # fmt: skip
        assert np.array_equal(limited, np.repeat([[0], [0], [255], [255]], 3, axis=1))
        full = nv12_canvas(np.full((2, 2), 77, np.uint8), chroma, matrix=matrix, full_range=True)
        assert (full == 77).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_size": (0, 9)}, "expected sizes of at least 1"),
        ({"resized_size": (33, 30)}, "a canvas that holds the resized frame"),
        ({"chroma_size": (4, 4)}, r"chroma of \[4, 4\] pairs"),
        ({"chroma_size": (5, 6)}, "rounded up or down"),
        ({"pitches": (8, 10)}, r"pitches \[8, 10\]"),
        ({"pitches": (9, 9)}, r"9 and 10 bytes have pitches \[9, 9\]"),
        ({"matrix": "bt470"}, "unknown colour matrix 'bt470'; expected bt601, bt709, bt2020"),
    ],
)
def test_what_is_no_frame_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "frame_size": (11, 9), "chroma_size": (6, 5), "pitches": (9, 10), "resized_size": (30, 30),
        "canvas_size": (32, 32), "matrix": "bt709", "full_range": False,
    }  # fmt: skip
    nv12_to_canvas_launch(**arguments)
    with pytest.raises(KernelError, match=message):
        nv12_to_canvas_launch(**(arguments | change))


def test_strides_past_int32_are_refused() -> None:
    with pytest.raises(KernelError, match="strides"):
        rgb_to_canvas_launch((4, 4), (4, 1, 2**30), (4, 4), (32, 32))


def test_constants_agree() -> None:
    source = (compile.FOLDER / "frame_to_canvas.cu").read_text()
    assert f"THREADS = {launch.FRAME_THREADS};" in source
    for name in ("COLOUR_SHIFT", "TILE_ROWS", "TILE_COLUMNS"):
        assert f"{name} = {getattr(launch, name)};" in source
