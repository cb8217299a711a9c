"""Everything comask raises on purpose. A command prints the message as one line and exits with 1."""

# In what allocators say: a CPU's, a GPU's, and PyTorch's of sizes beyond all memory.
_NO_MEMORY = ("llocate memory", "out of memory", "Storage size calculation overflowed")


class ComaskError(Exception):
    """A mistake that its reader can mend: the text says what was found, expected, and what to do."""


class ConfigError(ComaskError, ValueError):
    """A setting that does not exist or does not fit."""


class DataError(ComaskError, ValueError):
    """A data set or annotation file that cannot be used."""


class ImageError(ComaskError, ValueError):
    """An image that cannot be decoded."""


class VideoError(ComaskError, ValueError):
    """A video, camera or stream that cannot be opened or decoded."""


class CheckpointError(ComaskError, ValueError):
    """A checkpoint or weight file that cannot be read or does not fit the model."""


class BundleError(ComaskError, ValueError):
    """A bundle with missing, altered or unreadable files."""


class BackendUnavailableError(ComaskError, ImportError):
    """A backend whose packages are not installed."""


class ParityError(ComaskError):
    """An exported model that does not reproduce its PyTorch original."""


class TrainingError(ComaskError, RuntimeError):
    """A training run that cannot go on."""


class PrecisionError(ComaskError):
    """A lower precision does not keep its promise: too much AP is lost, or nothing is won."""


class CalibrationError(ComaskError, ValueError):
    """Images or a cache that cannot be calibrated with, or activations that are not finite."""


class EngineError(ComaskError, RuntimeError):
    """A TensorRT engine that cannot be built, loaded or trusted."""


class JobError(ComaskError, ValueError):
    """A job's folder that holds another job, or cannot be continued."""


class FleetError(ComaskError, RuntimeError):
    """A job whose parts cannot all be written."""


class NotFiniteError(EngineError):
    """A backend that computes NaN or infinities."""


class KernelError(ComaskError, RuntimeError):
    """A kernel that cannot be compiled, loaded or launched."""


class KernelUnavailableError(KernelError):
    """Kernels cannot be had on this machine: there is no compiler, no driver, or none for the device."""


class QueueFullError(ComaskError, RuntimeError):
    """All slots of a `StreamSession` run a batch."""


class FrameDroppedError(ComaskError, RuntimeError):
    """A newer frame took the place of this one before it ran."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was not to be had, for which PyTorch and ONNX Runtime have no kind of error."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def one_line(message: object) -> str:
    """What a terminal shows of a message as one line, and does not obey.

    Names of files and entries of JSON may hold line breaks, escape sequences and half characters. An
    error that says nothing is shown by its kind.
    """
    line = " ".join(str(message).split())
    if not line and isinstance(message, BaseException):
        line = type(message).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
