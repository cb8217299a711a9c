"""Checks frames from PyTorch and CuPy in a `StreamSession`, and its outputs in their hands."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from context import Context
from kernel_values import TORCH
from libraries import library
from rows import Check, Figure
from stand_in_session import ALIKE, PICTURES, distance, require_clean, the

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIBRARIES = {"torch": "PyTorch", "cupy": "CuPy"}
INTERFACES = {"dlpack": "DLPack", "cai": "__cuda_array_interface__"}


def frames(context: Context, *, name: str, interface: str) -> Figure:
    """Submits packed, planar and BGR frames of a library."""
    parts, source, worst = the(context), library(context, name), 0.0
    with parts.predictor.stream(slots=2) as session:
        for image in PICTURES:
            expected = parts.expected([image])[0]
            shapes: list[tuple[Any, str]] = [(image, "rgb"), (image[:, :, ::-1], "bgr")]
            shapes.append((image.transpose(2, 0, 1), "rgb"))
            for pixels, format in shapes:
                frame = source.frame(np.ascontiguousarray(pixels), interface)
                found = session.submit(frame, format=format).result()  # type: ignore[arg-type]
                worst = max(worst, distance(found, expected))
    require_clean()
    return Figure(value=worst, unit="px or %", most=ALIKE)


def nv12_frames(context: Context, *, name: str) -> Figure:
    """Submits NV12 as one array and as a pair of planes."""
    from comask.runtime.frames import Coding, borrow_frame

    parts, source, worst = the(context), library(context, name), 0.0
    luma, chroma = nv12_of(PICTURES[0])
    height, width = luma.shape
    pixels = borrow_frame((luma, chroma), -1, Coding("nv12", "bt709", False)).pixels()
    expected = parts.expected([pixels])[0]
    whole = np.concatenate((luma, chroma.reshape(height // 2, width)))
    with parts.predictor.stream(slots=1) as session:
        for arrays in ((whole,), (luma, chroma)):
            planes = tuple(source.frame(array, "dlpack") for array in arrays)
            frame = planes[0] if len(planes) == 1 else planes
            worst = max(worst, distance(session.submit(frame, format="nv12").result(), expected))
    require_clean()
    return Figure(value=worst, unit="px or %", most=ALIKE)


def nv12_of(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns planes Y [h, w] and UV [h/2, w/2, 2] of an RGB picture, in BT.709 and limited range."""
    red, green, blue = np.moveaxis(image.astype(np.float64), 2, 0)
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    luma = 16 + y * 219 / 255
    pairs = np.stack([(blue - y) / 1.8556, (red - y) / 1.5748], axis=2) * 224 / 255 + 128
    height, width = y.shape
    chroma = pairs.reshape(height // 2, 2, width // 2, 2, 2).mean(axis=(1, 3))
    return luma.round().astype(np.uint8), chroma.round().astype(np.uint8)


def written_late(context: Context, *, name: str, interface: str) -> Figure:
    """Submits a frame that its stream writes later, and overwrites it once it has been read."""
    parts, source, worst = the(context), library(context, name), 0.0
    expected = parts.expected([PICTURES[0]])[0]
    kept = []  # no memory may be freed while writes of it are queued
    with parts.predictor.stream(source.stream, slots=2) as session:
        for _ in range(4):  # eager, captured, replayed
            frame = source.frame(np.zeros_like(PICTURES[0]), interface)
            kept.append(frame)
            source.work()
            source.write(frame, PICTURES[0])
            future = session.submit(frame)
            future.wait_read(source.stream)
            source.write(frame, 0)
            worst = max(worst, distance(future.result(), expected))
    source.wait()
    require_clean()
    return Figure(value=worst, unit="px or %", most=ALIKE)


def outputs(context: Context, *, name: str, interface: str) -> Figure:
    """Reads outputs behind other work in the library's stream, while the next batch wants the slot."""
    parts, reader, worst = the(context), library(context, name), 0.0
    frames = [reader.frame(image, "dlpack") for image in PICTURES]
    expected = [parts.expected([image])[0] for image in PICTURES]
    with parts.predictor.stream(slots=1) as session:
        for _ in range(3):
            copies = []
            for frame in frames:
                future = session.submit(frame)
                reader.work()
                future.wait_on(reader.stream)  # so that the next batch waits for what is read here
                shared = future.outputs
                copies.append(
                    [reader.read(shared[n], interface) for n in ("num_detections", "scores")]
                )
            for (count, scores), found in zip(copies, expected, strict=True):
                number = int(reader.value(count)[0])
                if number != len(found):
                    raise RuntimeError(f"{number} detections were read, expected {len(found)}")
                read = reader.value(scores)[0, :number]
                worst = max(worst, 100 * float(np.abs(read - found.scores).max(initial=0.0)))
    require_clean()
    return Figure(value=worst, unit="%", most=ALIKE)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    needs = ("stand-in session", "device", "kernels", "onnxruntime", "trained bundle")
    real = {"torch": (TORCH,), "cupy": ("cupy",)}
    rows = []
    for name, title in LIBRARIES.items():
        more = (*needs, *real[name])
        for interface, words in INTERFACES.items():
            rows += [
                Check(
                    name=f"frames of {title} by {words}", needs=more,
                    run=partial(frames, name=name, interface=interface),
                    compared="the same pixels in ONNX Runtime on the CPU",
                    fails="strides, planes or the order of channels are misread",
                ),
                Check(
                    name=f"frames that {title} writes late, by {words}", needs=more,
                    run=partial(written_late, name=name, interface=interface),
                    compared="the pixels between two writes, in ONNX Runtime on the CPU",
                    fails="a stream does not wait, so zeros are seen",
                ),
                Check(
                    name=f"outputs in {title} by {words}", needs=more,
                    run=partial(outputs, name=name, interface=interface),
                    compared="the scores of the same frames in ONNX Runtime on the CPU",
                    fails="outputs are read too early, or overwritten by the next batch",
                ),
            ]  # fmt: skip
        rows.append(
            Check(
                name=f"NV12 frames of {title}",
                run=partial(nv12_frames, name=name),
                needs=more,
                compared="the converted pixels in ONNX Runtime on the CPU",
                fails="the planes are misread",
            )
        )
    return rows
