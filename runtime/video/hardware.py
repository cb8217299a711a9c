"""Decoding and encoding on an NVIDIA GPU, by FFmpeg, in the CUDA context that TensorRT runs in."""

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

FFMPEG_STREAM = 1  # CUDA's handle of the legacy default stream, which FFmpeg works on
FULL_RANGE = 2  # H.273's 0..255, as FFmpeg numbers it
# Numbers of H.273, and the matrix that FFmpeg's own conversion takes for each; 2 is "not stated".
MATRICES: Mapping[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoder:
    """What writes H.264.

    Attributes:
        codec: FFmpeg's name of it.
        options: of the codec.
        hwaccel: the GPU's context, or None.
    """

    codec: str
    options: dict[str, str]
    hwaccel: HWAccel | None = None


# Visually near the source, and fast enough to leave the processor to the network.
X264 = Encoder("libx264", {"preset": "veryfast", "crf": "20"})
# Without B-frames: NVENC derives their decoding times from the rate, which a variable one does not keep.
NVENC_OPTIONS = {"preset": "p4", "rc": "vbr", "cq": "21", "b": "0", "bf": "0"}


def gpu_decoder(decode: Where, gpu: int | None) -> HWAccel | None:
    """FFmpeg's settings for frames that stay on the GPU; None for decoding on the processor.

    Whether the GPU takes a video's codec shows with its first frame: see `nv12_problem`.

    Args:
        decode: where; `auto` is the GPU where that can be, and says in the log where it cannot.
        gpu: index of the one whose memory the predictor reads; None where it reads the host's.

    Raises:
        BackendUnavailableError: `gpu` was asked for and cannot be.
    """
    if decode == "cpu":
        return None
    if gpu is None:
        problem = "the backend reads frames in the host's memory; the tensorrt ones read the GPU's"
    else:
        problem, accelerated = _accelerated(gpu, "h264")
        if accelerated is not None:
            return accelerated
    _fall_back("decoding", decode, problem)
    return None


def choose_encoder(encode: Where, gpu: int | None, size: tuple[int, int]) -> Encoder:
    """NVENC, or x264.

    Args:
        encode: where; `auto` is the GPU where NVENC opens, and says in the log where it does not.
        gpu: index of the one that encodes; None for none.
        size: (h, w) of the video.

    Raises:
        BackendUnavailableError: `gpu` was asked for and cannot be.
    """
    if encode == "cpu":
        return X264
    if gpu is None:
        problem = "the processor alone is to be used"
    else:
        problem, accelerated = _accelerated(gpu, "h264_nvenc", size)
        if accelerated is not None:
            return Encoder("h264_nvenc", NVENC_OPTIONS, accelerated)
    _fall_back("encoding", encode, problem)
    return X264


def _accelerated(
    gpu: int, codec: str, encoded_size: tuple[int, int] | None = None
) -> tuple[str, HWAccel | None]:
    """Settings that were seen to work, or why there are none; an encoder is opened once."""
    _, problem = find_gpu_or_reason(gpu)
    if problem:
        return problem, None
    av = import_av()
    # What is hardware-owned uses the primary context, which is TensorRT's.
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


def _fall_back(what: str, asked: Where, problem: str) -> None:
    if asked == "gpu":
        raise BackendUnavailableError(f"{what} on the GPU cannot be had: {problem}")
    logger.info("%s on the processor: %s", what, problem)


def nv12_problem(
    decoded: VideoFrame, codec: VideoCodecContext, orientation: Orientation
) -> str | None:
    """Why the network cannot read a decoded frame on the GPU; None where it can.

    Args:
        decoded: the frame.
        codec: what decoded it.
        orientation: the frame's.
    """
    if decoded.format.name != "cuda":
        found = f"frames come as {decoded.format.name} in the host's memory"
        if not codec.is_hwaccel:
            return f"{found}: PyAV takes {codec.name} for this codec, which uses no GPU"
        return (
            f"{found}: the GPU does not decode this profile or size, or the driver's libnvcuvid is "
            f"missing, so that {codec.name} decodes on the processor"
        )
    layout = decoded.sw_format.name if decoded.sw_format else "unknown"
    if layout != "nv12":
        return f"frames are {layout}, and the network reads nv12, which has 8 bits"
    if orientation != UPRIGHT:
        return "frames are to be turned or mirrored, which is done on the host"
    if decoded.colorspace not in MATRICES:
        return f"there is no conversion on the GPU for colour matrix {decoded.colorspace} of H.273"
    return None


class Nv12Picture:
    """A decoded frame where FFmpeg has it, as `StreamSession.submit` takes it.

    Args:
        decoded: of 8-bit NV12, upright as it is.

    Attributes:
        planes: Y and UV.
        matrix: of the colours; where the video does not say, as FFmpeg takes it.
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
        """u8 [h, w, 3] RGB, brought to the host when first asked for."""
        return np.asarray(self._decoded.to_ndarray(format="rgb24"), dtype=np.uint8)


class _Plane:
    """A plane of PyAV's, which refuses a consumer's stream: whoever borrows it waits for FFmpeg's."""

    def __init__(self, plane: VideoPlane) -> None:
        self._plane = plane

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._plane.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> object:
        return self._plane.__dlpack__()
