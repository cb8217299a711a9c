"""Checks NVDEC and NVENC through PyAV, in the CUDA context that pycuda and PyTorch have opened."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from context import Context
from in_threads import in_threads
from rows import Check, Figure, UnavailableError
from stand_in_session import ALIKE, PICTURES, distance, require_clean, the

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAMES, RATE, SCALE = 24, 25, 2
# NVIDIA's encode matrix: these have decoders, but no encoder.
WITHOUT_NVENC = ("A100", "A30", "H100", "H200", "H800", "GH200", "B100", "B200", "GB200", "B300")
PSNR = 30.0  # dB; below, an encoder is broken rather than frugal


def frames() -> list[NDArray[np.uint8]]:
    """Returns the clip's frames, enlarged pictures that move."""
    large = [np.kron(image, np.ones((SCALE, SCALE, 1), np.uint8)) for image in PICTURES]
    return [np.roll(large[0], 4 * i, axis=1) for i in range(FRAMES)]


def clip(context: Context) -> Path:
    """Returns an H.264 file of `frames`; in a rehearsal, the stand-in decoder gets its pictures."""
    import av

    path = context.folder / "clip.mp4"
    if not path.exists():
        options = {"preset": "veryfast", "crf": "15"}
        # the stand-in decoder knows no order but that of packets
        _encode(path, "libx264", options | ({"bf": "0"} if context.rehearsal else {}), None)
    if context.rehearsal:
        raw = context.folder / "clip.nv12"
        with av.open(str(path)) as container:
            pictures = [f.reformat(format="nv12").to_ndarray() for f in container.decode(video=0)]
        raw.write_bytes(np.stack(pictures).tobytes())
        os.environ["STANDIN_PICTURES"] = str(raw)
    return path


def decoded(context: Context) -> Figure:
    """Decodes a clip on the GPU and compares its NV12 with that of the CPU's decoder."""
    from comask.runtime.device import open_device
    from comask.runtime.video import VideoSource

    path = clip(context)
    open_device()
    if not context.rehearsal:
        import torch

        torch.zeros(1, device="cuda")  # its context is the primary one as well
    wrong = count = 0
    with VideoSource(path, decode="gpu", gpu=0) as source:
        for frame, expected in zip(source, _on_cpu(path), strict=True):
            found = _nv12(frame.picture)
            wrong, count = wrong + int((found != expected).sum()), count + 1
    return Figure(value=float(wrong), unit=f"bytes of {count} frames", most=0)


def streamed(context: Context) -> Figure:
    """Decodes a clip on the GPU and runs it in a pipeline; its frames never pass through the host."""
    from comask.runtime.frames import Coding, borrow_frame
    from comask.runtime.video import VideoPipeline, VideoSource

    parts, path, worst = the(context), clip(context), 0.0
    results: list[tuple[Any, Any]] = []

    class Kept:
        """A sink that keeps the results."""

        def add(self, frame: Any, found: Any, track_ids: object) -> None:
            results.append((frame.picture, found))

    source = VideoSource(path, gpu=parts.predictor.stages.gpu)
    VideoPipeline(parts.predictor, source, [Kept()], batch=2).run()
    for (picture, found), nv12 in zip(results, _on_cpu(path), strict=True):
        if isinstance(picture, np.ndarray):
            raise RuntimeError("the clip was decoded on the CPU; the log says why")
        height = len(nv12) // 3 * 2
        planes = nv12[:height], nv12[height:].reshape(height // 2, -1, 2)
        pixels = borrow_frame(
            planes, -1, Coding("nv12", picture.matrix, picture.full_range)
        ).pixels()
        worst = max(worst, distance(found, parts.expected([pixels])[0]))
    require_clean()
    return Figure(value=worst, unit="px or %", most=ALIKE, note=f"{FRAMES} frames")


def decoded_by_threads(context: Context) -> Figure:
    """Decodes the clip in three threads at once, none of which has a context."""
    from comask.runtime.video import VideoSource

    path, wrong = clip(context), [0]
    expected = list(_on_cpu(path))

    def decode(_: int) -> None:
        with VideoSource(path, decode="gpu", gpu=0) as source:
            for frame, nv12 in zip(source, expected, strict=True):
                wrong[0] += int((_nv12(frame.picture) != nv12).sum())

    if errors := in_threads(3, decode):
        raise errors[0]
    return Figure(value=float(wrong[0]), unit="bytes", most=0)


def encoded(context: Context) -> Figure:
    """Encodes frames with NVENC and decodes them on the CPU."""
    from comask.runtime.gpu import find_gpu
    from comask.runtime.video.hardware import choose_encoder

    gpu, images = find_gpu(), frames()
    if gpu is not None and any(name in gpu.name.split() for name in WITHOUT_NVENC):
        raise UnavailableError(f"{gpu.name} has no encoder")
    path = context.folder / "nvenc.mp4"
    encoder = choose_encoder("gpu", 0, (images[0].shape[0], images[0].shape[1]))
    _encode(path, encoder.codec, encoder.options, encoder)
    errors = [
        np.square(found.astype(float) - expected).mean()
        for found, expected in zip(_on_cpu(path, "rgb24"), images, strict=True)
    ]
    decibels = 10 * np.log10(255**2 / max(errors))
    return Figure(value=float(decibels), unit="dB", least=PSNR, note=encoder.codec)


def _encode(path: Path, codec: str, options: dict[str, str], encoder: Any) -> None:
    import av

    with av.open(str(path), "w") as output:
        if encoder is None:
            track: Any = output.add_stream(codec, rate=RATE, options=options)
        else:
            track = encoder.add_to(output, Fraction(RATE))
        track.height, track.width = frames()[0].shape[:2]
        track.pix_fmt = "yuv420p"
        for place, image in enumerate(frames()):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            picture.pts, picture.time_base = place, Fraction(1, RATE)
            output.mux(track.encode(picture))
        output.mux(track.encode(None))


def _on_cpu(path: Path, format: str = "nv12") -> Any:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(format=format).to_ndarray()


def _nv12(picture: Any) -> NDArray[np.uint8]:
    """Copies a picture on the GPU to the host, on a stream of ours that waits for FFmpeg's."""
    from comask.runtime.device import open_device
    from comask.runtime.dlpack import UNORDERED, borrow
    from comask.runtime.video.hardware import FFMPEG_STREAM

    rows = []
    with open_device() as device:
        stream = device.stream()
        for plane in picture.planes:
            borrowed = borrow(plane, UNORDERED)
            height, pitch = borrowed.shape[0], borrowed.strides[0]
            memory, values = device.memory(height * pitch), np.zeros((height, pitch), np.uint8)
            stream.wait_for(FFMPEG_STREAM)
            stream.copy_over(memory, borrowed.address)
            stream.copy_out(values, memory)
            stream.synchronize()
            memory.free()
            borrowed.release()
            rows.append(values[:, : picture.size[1]])
        stream.close()
    return np.concatenate(rows)


def checks() -> list[Check]:
    """Returns the rows of the group."""
    needs = ("device", "av", "NVDEC")
    exact = "the CPU's decoder, byte for byte, as H.264 requires"
    return [
        Check(
            name="NVDEC decodes in our context", run=decoded, needs=needs, compared=exact,
            provides="NVDEC works", fails="FFmpeg refuses the primary context, or order is lost",
        ),
        Check(
            name="NVDEC in three threads", run=decoded_by_threads, needs=(*needs, "NVDEC works"),
            compared=exact, fails="a thread without a context cannot decode",
        ),
        Check(
            name="frames of NVDEC in a stream", run=streamed, limit=45, compared=(
                "the same frames, decoded on the CPU, in ONNX Runtime"
            ),
            needs=(*needs, "NVDEC works", "stand-in session", "kernels", "onnxruntime",
                   "trained bundle"),
            fails="a surface is read before it is decoded or after it was given back",
        ),
        Check(
            name="NVENC encodes", run=encoded, needs=("device", "av", "NVENC", "real GPU"),
            compared="the frames before encoding", fails=f"PSNR is below {PSNR:g} dB",
        ),
    ]  # fmt: skip
