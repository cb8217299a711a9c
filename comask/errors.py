"""The exceptions that comask raises. A command prints their message as one line and exits with 1."""

# Parts of allocators' messages: a CPU's, a GPU's, and PyTorch's for sizes beyond any memory.
_NO_MEMORY = ("llocate memory", "out of memory", "Storage size calculation overflowed")


class ComaskError(Exception):
    """An error that the user can fix: the text says what was found, what was expected and what to do."""


class ConfigError(ComaskError, ValueError):
    """A setting that does not exist or does not fit."""


class DataError(ComaskError, ValueError):
    """A data set or an annotation file that cannot be used."""


class ImageError(ComaskError, ValueError):
    """An image that cannot be decoded."""


class VideoError(ComaskError, ValueError):
    """A video, camera or stream that cannot be opened or decoded."""


class CheckpointError(ComaskError, ValueError):
    """A checkpoint or a weight file that cannot be read or does not fit the model."""


class BundleError(ComaskError, ValueError):
    """A bundle with missing, altered or unreadable files."""


class BackendUnavailableError(ComaskError, ImportError):
    """A backend whose packages are not installed."""


class ParityError(ComaskError):
    """An exported model that does not reproduce its PyTorch original."""


class TrainingError(ComaskError, RuntimeError):
    """A training run that cannot continue."""


class PrecisionError(ComaskError):
    """A lower precision that loses too much AP or gains nothing."""


class CalibrationError(ComaskError, ValueError):
    """Images or a cache that calibration cannot use, or activations that are not finite."""


class EngineError(ComaskError, RuntimeError):
    """A TensorRT engine that cannot be built, loaded or trusted."""


class UnsupportedGpuError(EngineError):
    """A TensorRT engine that is in order, but whose TensorRT does not support this GPU or driver."""


class JobError(ComaskError, ValueError):
    """A job's folder that holds another job, or whose job cannot be continued."""


class FleetError(ComaskError, RuntimeError):
    """A job that cannot write all of its parts."""


class NotFiniteError(EngineError):
    """A backend that computes NaN or infinities."""


class KernelError(ComaskError, RuntimeError):
    """A kernel that cannot be compiled, loaded or launched."""


class KernelUnavailableError(KernelError):
    """A kernel that this machine cannot run: a compiler, the driver or a supported device is missing."""


class QueueFullError(ComaskError, RuntimeError):
    """A `StreamSession` whose slots all run a batch."""


class FrameDroppedError(ComaskError, RuntimeError):
    """A frame that a newer one replaced before it ran."""


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation failed; PyTorch and ONNX Runtime have no type for that error."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def one_line(message: object) -> str:
    """Returns a message as one line without control characters, which a terminal would obey.

    File names and JSON entries may contain line breaks, escape sequences and incomplete characters. For
    an error without a message, the line is its type.
    """
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
