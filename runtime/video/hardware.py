"""Decodes and encodes video with FFmpeg on an NVIDIA GPU, in the CUDA context of TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from comask.errors import BackendUnavailableError
from comask.preprocess import Pixels
from comask.runtime.device import find_gpu_or_reason
from comask.runtime.video.container import UPRIGHT, Orientation, import_av, reason

if TYPE_CHECKING:
    from av import VideoFrame
    from av.codec.hwaccel import HWAccel
    from av.video.codeccontext import VideoCodecContext
    from av.video.plane import VideoPlane

    from comask.kernels.launch import Matrix

Where: TypeAlias = Literal["auto", "cpu", "gpu"]

FFMPEG_STREAM = 1  # CUDA's handle of the legacy default stream, which FFmpeg uses
FULL_RANGE = 2  # FFmpeg's number of H.273's range 0..255
# H.273's code points, with the matrix that FFmpeg's own conversion uses for each; 2 is "unspecified".
MATRICES: Mapping[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder of H.264.

    Attributes:
        codec: FFmpeg's name of the codec.
        options: the codec's options.
        hwaccel: the GPU's context, or None.
    """

    codec: str
    options: dict[str, str]
    hwaccel: HWAccel | None = None


# Visually close to the source, and fast enough to leave most of the CPU to the network.
X264 = Encoder("libx264", {"preset": "veryfast", "crf": "20"})
# No B-frames: NVENC derives their decoding times from a constant rate, which a video may not have.
NVENC_OPTIONS = {"preset": "p4", "rc": "vbr", "cq": "21", "b": "0", "bf": "0"}


def gpu_decoder(decode: Where, gpu: int | None) -> HWAccel | None:
    """Returns FFmpeg's settings for frames that stay on the GPU; None for decoding on the CPU.

    Only its first frame shows whether the GPU supports a video's codec, see `nv12_problem`.

    Args:
        decode: `gpu`, `cpu`, or `auto` for the GPU if possible; otherwise the log states the reason.
        gpu: index of the GPU whose memory the predictor reads; None if it reads the host's memory.

    Raises:
        BackendUnavailableError: `decode` is `gpu`, and the GPU cannot decode.
    """
    if decode == "cpu":
        return None
    if gpu is None:
        problem = "the backend reads frames in the host's memory; tensorrt backends read the GPU's"
    else:
        problem, accelerated = _accelerated(gpu, "h264")
        if accelerated is not None:
            return accelerated
    _fall_back("decoding", decode, problem)
    return None


def choose_encoder(encode: Where, gpu: int | None, size: tuple[int, int]) -> Encoder:
    """Returns NVENC or x264.

    Args:
        encode: `gpu`, `cpu`, or `auto` for NVENC if possible; otherwise the log states the reason.
        gpu: index of the GPU that encodes; None for no GPU.
        size: (h, w) of the video.

    Raises:
        BackendUnavailableError: `encode` is `gpu`, and the GPU cannot encode.
    """
    if encode == "cpu":
        return X264
    if gpu is None:
        problem = "only the CPU is to be used"
    else:
        problem, accelerated = _accelerated(gpu, "h264_nvenc", size)
        if accelerated is not None:
            return Encoder("h264_nvenc", NVENC_OPTIONS, accelerated)
    _fall_back("encoding", encode, problem)
    return X264


def _accelerated(
    gpu: int, codec: str, encoded_size: tuple[int, int] | None = None
) -> tuple[str, HWAccel | None]:
    """Returns ("", settings that were tested), or (the reason why they do not work, None)."""
    _, problem = find_gpu_or_reason(gpu)
    if problem:
        return problem, None
    av = import_av()
    # With `is_hw_owned`, PyAV uses the primary context, which is TensorRT's.
    accelerated: HWAccel = av.codec.hwaccel.HWAccel(
        "cuda", device=gpu, allow_software_fallback=True, is_hw_owned=True
    )
    try:
        if encoded_size is None:
            accelerated.create(av.Codec(codec, "r"))
            return "", accelerated
        trial = av.CodecContext.create(codec, "w", hwaccel=accelerated)
        trial.height, trial.width = (side + side % 2 for side in encoded_size)
        trial.pix_fmt, trial.framerate, trial.options = "yuv420p", 25, NVENC_OPTIONS
        trial.open()
    except (av.FFmpegError, NotImplementedError) as error:
        return f"FFmpeg cannot open {codec} on GPU {gpu} ({reason(error)})", None
    return "", accelerated


def _fall_back(work: str, asked: Where, problem: str) -> None:
    if asked == "gpu":
        raise BackendUnavailableError(f"{work} on the GPU is not possible: {problem}")
    logger.info("%s on the CPU: %s", work, problem)


def nv12_problem(
    decoded: VideoFrame, codec: VideoCodecContext, orientation: Orientation
) -> str | None:
    """Returns why the network cannot read a decoded frame on the GPU; None if it can.

    Args:
        decoded: the frame.
        codec: the codec that decoded it.
        orientation: the frame's orientation.
    """
    if decoded.format.name != "cuda":
        problem = f"frames are {decoded.format.name} in the host's memory"
        if not codec.is_hwaccel:
            return f"{problem}: PyAV decodes this codec by {codec.name}, which uses no GPU"
        return (
            f"{problem}: the GPU does not decode this profile or size, or the driver's libnvcuvid is "
            f"missing, so {codec.name} decodes on the CPU"
        )
    layout = decoded.sw_format.name if decoded.sw_format else "unknown"
    if layout != "nv12":
        return f"frames are {layout}, but the network reads only nv12, which has 8 bits"
    if orientation != UPRIGHT:
        return "frames must be turned or mirrored, which is done on the host"
    if decoded.colorspace not in MATRICES:
        return f"the GPU has no conversion for colour matrix {decoded.colorspace} of H.273"
    return None


class Nv12Picture:
    """A decoded frame in FFmpeg's GPU memory, for `StreamSession.submit`.

    Args:
        decoded: the frame, in 8-bit NV12 and upright.

    Attributes:
        planes: the planes Y and UV.
        matrix: the colour matrix; if the video does not state one, FFmpeg's default.
        full_range: whether Y, U and V use 0..255.
        size: (h, w) in pixels.
    """

    def __init__(self, decoded: VideoFrame) -> None:
        self._decoded = decoded
        self.planes = (_Plane(decoded.planes[0]), _Plane(decoded.planes[1]))
        self.matrix: Matrix = MATRICES[decoded.colorspace]
        self.full_range = decoded.color_range == FULL_RANGE
        self.size = (decoded.height, decoded.width)

    @cached_property
    def pixels(self) -> Pixels:
        """u8 [h, w, 3] RGB; the first access copies the frame to the host."""
        return np.asarray(self._decoded.to_ndarray(format="rgb24"), dtype=np.uint8)


class _Plane:
    """A plane of PyAV, which accepts no consumer's stream: consumers wait for FFmpeg's stream."""

    def __init__(self, plane: VideoPlane) -> None:
        self._plane = plane

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._plane.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> object:
        return self._plane.__dlpack__()
