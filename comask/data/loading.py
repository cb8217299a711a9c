"""Batches of a training set: which images share one, and the processes that load them."""

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
    """Images on one canvas.

    Attributes:
        images: u8 [B, H, W, 3] RGB.
        image_sizes: i32 [B, 2], (h, w) in pixels of each image on the canvas.
        targets: one an image.
        image_ids: the data set's ids.
    """

    images: Tensor
    image_sizes: Tensor
    targets: list[Target]
    image_ids: list[Id]

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from where a GPU fetches it while the CPU goes on.

        PyTorch's loader calls this where there is a GPU.
        """
        return moved_tensors(self, Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """The same in memory that another process can map."""
        return moved_tensors(self, Tensor.share_memory_)


def epoch_batches(
    dataset: TrainingSet, batch_size: int, seed: int, epoch: int, *, ranks: int = 1
) -> list[list[Key]]:
    """One epoch's batches: each image once, landscape and portrait images apart.

    What is left of both at the end shares batches, padded; only the last may be smaller. Images of
    the epoch's start fill that one up to a multiple of `ranks`, so that every process has its share.
    """
    rng = np.random.default_rng([seed, epoch])
    order = [dataset.indices[i] for i in rng.permutation(len(dataset.indices))]
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
    """One process's share of a batch, in parts of at most `size` images (0: in one)."""
    share = batch[rank::ranks]
    size = size or len(share)
    return [share[i : i + size] for i in range(0, len(share), size)]


_NO_SHARED_MEMORY = (
    "/dev/shm is full, through which processes hand over batches; a container gets more by "
    "--shm-size=8g or --ipc=host, and data.workers=0 needs none; then go on with --resume"
)


@contextmanager
def load_batches(
    dataset: TrainingSet, batches: list[list[Key]], *, workers: int
) -> Iterator[Iterator[Batch]]:
    """The given batches in order; the processes that load them end with the block, however it is left.

    Args:
        dataset: what is loaded.
        batches: the keys of each batch.
        workers: how many processes load; 0 for this one alone.

    Raises:
        TrainingError: when an image cannot be loaded, or a process that loads was killed. PyTorch raises
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
    except OSError as error:  # no memory, or no more processes
        raise TrainingError(
            f"{workers} processes to load images cannot be started ({error.strerror}): take fewer "
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
        # An iterator ends its processes when it is collected. An exception may keep it for long, so it is
        # told to; and a process in the middle of an image ignores that and SIGTERM.
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
            error.add_note(batch.traceback)  # shown with --verbose
            raise error
        yield batch


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a batch could not be loaded, handed over like a batch: an exception would lose its kind."""

    message: str
    traceback: str


class _BatchLoading(Dataset["Batch | _Failure"]):
    """Loads whole batches, and never raises."""

    def __init__(self, dataset: TrainingSet) -> None:
        self._dataset = dataset

    def __getitem__(self, keys: list[Key]) -> Batch | _Failure:
        """The batch of these keys."""
        name = ""
        try:
            items = []
            for key in keys:
                name = self._dataset.source.info(key[1]).file_name
                items.append(self._dataset[key])
            batch = collate(items)
            # Here and not on the way to the parent, where a full /dev/shm would lose the batch.
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
            f"{name}: not enough memory to load its batch ({one_line(error)}): take fewer data.workers "
            f"or a smaller train.batch_size, and go on with --resume"
        )
    return f"{name}: cannot be loaded: {type(error).__name__}: {one_line(error)}"


def _killed(codes: list[int], workers: int, text: str) -> TrainingError:
    """The error of a process that did not end by itself."""
    names = {signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes}
    ending = f"ended by {' and '.join(sorted(names))}" if names else f"lost ({one_line(text)})"
    found = f"a process that loads images was {ending}"
    if "SIGBUS" in names:
        return TrainingError(f"{found}: {_NO_SHARED_MEMORY}")
    if "SIGKILL" in names:
        return TrainingError(
            f"{found}, most likely because memory ran out: go on with --resume --set "
            f"data.workers={workers // 2}"
        )
    return TrainingError(
        f"{found}: go on with --resume, or with data.workers=0 to see where it fails"
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent still needs its batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[Item]) -> Batch:
    """Images of differing canvases on one that holds them all."""
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
