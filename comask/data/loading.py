"""Groups the images of a training set into batches, and loads batches in other processes."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from comask.data.source import Id
from comask.data.training_set import Item, Key, Target, TrainingSet, moved_tensors
from comask.errors import ComaskError, TrainingError, is_out_of_memory, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images on canvases of one size, with their targets.

    Attributes:
        images: u8 [B, H, W, 3] RGB.
        image_sizes: i32 [B, 2], (h, w) in pixels of each image on its canvas.
        targets: one per image.
        image_ids: the images' ids in the data set.
    """

    images: Tensor
    image_sizes: Tensor
    targets: list[Target]
    image_ids: list[Id]

    def pin_memory(self) -> Batch:
        """Returns a copy in pinned memory, which a GPU reads while the CPU continues.

        PyTorch's loader calls this if the machine has a GPU.
        """
        return moved_tensors(self, Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """Returns the batch in memory that other processes can map."""
        return moved_tensors(self, Tensor.share_memory_)


def epoch_batches(
    dataset: TrainingSet, batch_size: int, seed: int, epoch: int, *, ranks: int = 1
) -> list[list[Key]]:
    """Returns one epoch's batches, with landscape and portrait images separate.

    Each image occurs once, or with `data.repeat_threshold` as often as `TrainingSet.times` says. The
    images left over from both groups share batches; only the last of these may be smaller. Images from
    the start of the epoch fill it up to a multiple of `ranks`, so that every process has a share.
    """
    rng = np.random.default_rng([seed, epoch])
    indices = dataset.indices
    if dataset.config.repeat_threshold:
        indices = np.repeat(indices, dataset.times(rng)).tolist()
    order = [indices[i] for i in rng.permutation(len(indices))]
    groups: dict[bool, list[Key]] = {False: [], True: []}
    batches = []
    for index in order:
        info = dataset.source.info(index)
        group = groups[info.width >= info.height]
        group.append((epoch, index))
        if len(group) == batch_size:
            batches.append(group.copy())
            group.clear()
    rest = groups[False] + groups[True]
    missing = -len(rest) % ranks
    rest += [(epoch, order[i % len(order)]) for i in range(missing)]
    batches += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch: list[Key], size: int, rank: int, ranks: int) -> list[list[Key]]:
    """Returns one process's share of a batch in parts of at most `size` images (0: one part)."""
    share = batch[rank::ranks]
    size = size or len(share)
    return [share[i : i + size] for i in range(0, len(share), size)]


_NO_SHARED_MEMORY = (
    "/dev/shm is full, and processes pass batches through it; start the container with "
    "--shm-size=8g or --ipc=host, or set data.workers=0; then go on with --resume"
)


@contextmanager
def load_batches(
    dataset: TrainingSet, batches: list[list[Key]], *, workers: int
) -> Iterator[Iterator[Batch]]:
    """Loads the given batches in order, and ends the loading processes when the block is left.

    Args:
        dataset: the data set to load from.
        batches: the keys of each batch.
        workers: the number of loading processes; with 0, this process loads.

    Raises:
        TrainingError: when an image cannot be loaded, or a loading process was killed. PyTorch may raise
            the latter anywhere in the block.
    """
    loader: DataLoader[Batch | _Failure] = DataLoader(
        _BatchLoading(dataset),
        batch_size=None,  # an item is a batch
        sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except OSError as error:  # out of memory, or too many processes
        raise TrainingError(
            f"{workers} processes to load images cannot be started ({error.strerror}): lower "
            f"data.workers"
        ) from error
    processes = [child for child in multiprocessing.active_children() if child not in others]
    try:
        yield _checked(iterator)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        codes = [process.exitcode for process in processes if process.exitcode]
        raise _killed(codes, workers, str(error)) from error
    finally:
        # An iterator ends its processes when it is collected, which an exception may delay for long. A
        # process that is decoding an image ignores both this request and SIGTERM, hence `kill`.
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _checked(loaded: Iterator[Batch | _Failure]) -> Iterator[Batch]:
    for batch in loaded:
        if isinstance(batch, _Failure):
            error = TrainingError(batch.message)
            error.add_note(batch.traceback)  # --verbose shows it
            raise error
        yield batch


@dataclass(frozen=True, slots=True)
class _Failure:
    """The reason why a batch could not be loaded.

    It is handed over like a batch, since PyTorch would replace an exception by one of another type.
    """

    message: str
    traceback: str


class _BatchLoading(Dataset["Batch | _Failure"]):
    """A data set whose items are whole batches; it returns failures instead of raising them."""

    def __init__(self, dataset: TrainingSet) -> None:
        self._dataset = dataset

    def __getitem__(self, keys: list[Key]) -> Batch | _Failure:
        """Loads the batch with these keys."""
        name = ""
        try:
            items = []
            for key in keys:
                name = self._dataset.source.info(key[1]).file_name
                items.append(self._dataset[key])
            batch = collate(items)
            # Shared here, since a full /dev/shm would lose the batch silently on its way to the parent.
            return batch.share_memory() if get_worker_info() else batch
        except Exception as error:
            return _Failure(_message(error, name), traceback.format_exc())


def _message(error: Exception, name: str) -> str:
    if isinstance(error, ComaskError):
        return one_line(error)
    if "shared memory" in str(error):
        return f"{name}: its batch cannot be handed over: {_NO_SHARED_MEMORY}"
    if is_out_of_memory(error):
        return (
            f"{name}: not enough memory to load its batch ({one_line(error)}): lower data.workers or "
            f"train.batch_size, and go on with --resume"
        )
    return f"{name}: cannot be loaded: {type(error).__name__}: {one_line(error)}"


def _killed(codes: list[int], workers: int, text: str) -> TrainingError:
    """Returns the error for loading processes that were killed or failed."""
    names = {signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes}
    ending = f"ended by {' and '.join(sorted(names))}" if names else f"lost ({one_line(text)})"
    event = f"a process that loads images was {ending}"
    if "SIGBUS" in names:
        return TrainingError(f"{event}: {_NO_SHARED_MEMORY}")
    if "SIGKILL" in names:
        return TrainingError(
            f"{event}, most likely because memory ran out: go on with --resume --set "
            f"data.workers={workers // 2}"
        )
    return TrainingError(
        f"{event}: go on with --resume, or with data.workers=0 to see where it fails"
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignores signals that reach the whole process group, since the parent still needs its batches.

    Ctrl-C and a scheduler's SIGTERM are such signals.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[Item]) -> Batch:
    """Makes a batch of images by extending their canvases to the largest height and width."""
    canvases, sizes, targets, image_ids = zip(*items, strict=True)
    height, width = (max(canvas.shape[axis] for canvas in canvases) for axis in (0, 1))
    images = torch.zeros((len(items), height, width, 3), dtype=torch.uint8)
    for image, canvas in zip(images, canvases, strict=True):
        image[: canvas.shape[0], : canvas.shape[1]] = canvas
    return Batch(
        images=images,
        image_sizes=torch.tensor(sizes, dtype=torch.int32),
        targets=list(targets),
        image_ids=list(image_ids),
    )
