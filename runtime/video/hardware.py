"""Decodes and encodes video with FFmpeg on an NVIDIA GPU, in the CUDA context of TensorRT."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from comask.errors import BackendUnavailableError
from comask.preprocess import Pixels
from comask.runtime.device import Device, open_device
from comask.runtime.gpu import find_gpu_or_reason
from comask.runtime.video.container import UPRIGHT, Orientation, import_av, reason

if TYPE_CHECKING:
    from av import VideoFrame
    from av.codec.hwaccel import HWAccel
    from av.container import OutputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.plane import VideoPlane
    from av.video.stream import VideoStream

    from comask.kernels.launch import Matrix

Where: TypeAlias = Literal["auto", "cpu", "gpu"]

FFMPEG_STREAM = 1  # CUDA's handle of the legacy default stream, which FFmpeg uses (its own is NULL)
FULL_RANGE = 2  # FFmpeg's number of H.273's range 0..255
# H.273's code points, with the matrix that FFmpeg's own conversion uses for each; 2 is "unspecified".
MATRICES: Mapping[int, Matrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020"}

logger = logging.getLogger(__name__)
_trials = threading.Lock()


class GpuCodecs(AbstractContextManager["HWAccel"]):
    """FFmpeg's decoders and encoders on a GPU, in the CUDA context of TensorRT.

    `with` makes the context current and returns PyAV's settings. FFmpeg takes the context that is current
    where a container is opened or an encoder is created, in any thread, so both must happen inside the
    block. Afterwards, FFmpeg itself makes the context current wherever it needs it. It neither retains
    the context nor destroys it; a `Device` keeps it as long as the process lives.

    By PyAV's default, FFmpeg would open the primary context with a flag of its own. It refuses one that
    is open without this flag, as pycuda, TensorRT and PyTorch open it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._settings: HWAccel = import_av().codec.hwaccel.HWAccel(
            "cuda",
            device=device.index,
            allow_software_fallback=True,
            options={"primary_ctx": "0", "current_ctx": "1"},
            is_hw_owned=True,  # decoded frames stay in the GPU's memory
        )

    def __enter__(self) -> HWAccel:
        self._device.__enter__()
        return self._settings

    def __exit__(self, *error: object) -> None:
        self._device.__exit__(*error)


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder of H.264.

    Attributes:
        codec: FFmpeg's name of the codec.
        options: the codec's options.
        gpu: the GPU that encodes; None for the CPU.
    """

    codec: str
    options: dict[str, str]
    gpu: GpuCodecs | None = None

    def add_to(self, output: OutputContainer, rate: Fraction) -> VideoStream:
        """Adds a track of `rate` frames per second to a file that is being written."""
        with self.gpu or nullcontext() as hwaccel:
            track = output.add_stream(self.codec, rate=rate, options=self.options, hwaccel=hwaccel)
        return cast("VideoStream", track)

    def open_once(self, size: tuple[int, int]) -> None:
        """Opens the encoder for frames of (h, w), to learn whether it works; exceptions are PyAV's."""
        with self.gpu or nullcontext() as hwaccel:
            codec = import_av().CodecContext.create(self.codec, "w", hwaccel=hwaccel)
        codec.height, codec.width = (side + side % 2 for side in size)
        codec.pix_fmt, codec.framerate, codec.options = "yuv420p", 25, self.options
        codec.open()


# Visually close to the source, and fast enough to leave most of the CPU to the network.
X264 = Encoder("libx264", {"preset": "veryfast", "crf": "20"})
# No B-frames: NVENC derives their decoding times from a constant rate, which a video may not have.
NVENC = Encoder("h264_nvenc", {"preset": "p4", "rc": "vbr", "cq": "21", "b": "0", "bf": "0"})


class _RefusedError(Exception):
    """There is a GPU, but FFmpeg cannot use it."""


def gpu_decoder(decode: Where, gpu: int | None) -> tuple[GpuCodecs | None, str | None]:
    """Returns the codecs of the GPU that decodes; None and the reason if `auto` takes the CPU.

    Only its first frame shows whether the GPU supports a video's codec, see `nv12_problem`.

    Args:
        decode: `gpu`, `cpu`, or `auto` for the GPU if possible; otherwise the log states the reason.
        gpu: index of the GPU whose memory the predictor reads; None if it reads the host's memory.

    Raises:
        BackendUnavailableError: `decode` is `gpu`, and the GPU cannot decode.
    """
    if decode == "cpu":
        return None, None
    try:
        if gpu is None:
            raise BackendUnavailableError(
                "the backend reads frames in the host's memory; tensorrt backends read the GPU's"
            )
        codecs = _codecs_of(gpu)
        with _trial(f"h264 on GPU {gpu}"), codecs as hwaccel:
            hwaccel.create(import_av().Codec("h264", "r"))
    except (BackendUnavailableError, _RefusedError) as error:
        _fall_back("decoding", decode, error)
        return None, str(error)
    return codecs, None


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
    try:
        if gpu is None:
            raise BackendUnavailableError("only the CPU is to be used")
        nvenc = replace(NVENC, gpu=_codecs_of(gpu))
        with _trial(f"{NVENC.codec} on GPU {gpu}"):
            nvenc.open_once(size)
    except (BackendUnavailableError, _RefusedError) as error:
        _fall_back("encoding", encode, error)
        return X264
    return nvenc


def _codecs_of(gpu: int) -> GpuCodecs:
    """Returns the codecs of a GPU, untested.

    Raises:
        BackendUnavailableError: there is no such GPU, or pycuda is missing.
    """
    _, problem = find_gpu_or_reason(gpu)
    if problem:
        raise BackendUnavailableError(problem)
    return GpuCodecs(open_device(gpu))


@contextmanager
def _trial(what: str) -> Iterator[None]:
    """Turns every exception of PyAV in the block into a `_RefusedError` with FFmpeg's own words.

    The exceptions alone hold texts such as "Operation not permitted". The words are log messages, which
    PyAV otherwise discards; its settings for them are the process's.
    """
    from av import logging as log

    with _trials:
        before = log.get_level(), log.get_skip_repeated()
        log.set_level(log.ERROR)
        log.set_skip_repeated(False)
        parts: list[tuple[int, str, str]] = []
        try:
            with log.Capture() as parts:
                yield
        except Exception as error:  # PyAV raises more than FFmpegError.
            said = "".join(part for _, _, part in parts)  # A line may come in several parts.
            words = "; ".join(line.rstrip(" .") for line in said.splitlines()) or reason(error)
            raise _RefusedError(f"FFmpeg cannot open {what} ({words})") from error
        finally:
            log.set_level(before[0])
            log.set_skip_repeated(before[1])


def _fall_back(work: str, asked: Where, error: Exception) -> None:
    """Logs why the CPU does the work, or raises that the GPU cannot if it was asked for."""
    if asked == "gpu":
        raise BackendUnavailableError(f"{work} on the GPU is not possible: {error}") from error
    if isinstance(error, _RefusedError):
        _warn_once(f"{work} on the CPU: {error}")
    else:
        logger.info("%s on the CPU: %s", work, error)


@functools.cache
def _warn_once(text: str) -> None:
    """Logs a warning, but only once for all videos of a process."""
    logger.warning(text)


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
