"""The data of a run, read and checked by one process per machine, in memory that the others share."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from comask.config import DataConfig
from comask.data.open_source import TrainingData, open_training_data
from comask.data.packed import PackedSource
from comask.errors import ComaskError
from comask.training.distributed import Ranks, leads_its_machine, share_on_machine

MEMORY = Path("/dev/shm")  # a folder in memory
_SPARE = 2  # times what is written there; batches pass through it, too


def open_shared(
    config: DataConfig, data: str, val: str | None, seed: int, ranks: Ranks
) -> TrainingData:
    """Opens the data of a run; see `open_training_data` for the arguments.

    Raises:
        DataError: see `open_training_data`; on the process that reads for its machine.
        SystemExit: then, on the others, so that the error is said once.
    """
    if ranks.world == 1:
        return open_training_data(config, data, val, seed)
    offer: _Offer | ComaskError | None = None
    if leads_its_machine():
        try:
            offer = _offered(open_training_data(config, data, val, seed))
        except ComaskError as error:
            offer = error
    offer = share_on_machine(offer)
    if isinstance(offer, ComaskError):
        if leads_its_machine():
            raise offer
        sys.exit(1)
    assert offer is not None
    try:
        return offer.taken()
    finally:
        share_on_machine(None)  # everybody has it open
        if leads_its_machine() and offer.folder:
            shutil.rmtree(offer.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Offer:
    """How the other processes of a machine get at its data.

    Attributes:
        folder: of the packed data sets, `train` and `val`; empty where sources are cheap to hand over.
        data: without the packed sources.
    """

    folder: str
    data: TrainingData

    def taken(self) -> TrainingData:
        if not self.folder:
            return self.data
        train = PackedSource.open(Path(self.folder, "train"))
        val = Path(self.folder, "val")
        opened = PackedSource.open(val) if val.exists() else train
        return TrainingData(train, self.data.train_indices, opened, self.data.val_indices)


def _offered(opened: TrainingData) -> _Offer:
    packed = {"train": opened.train}
    if opened.val is not opened.train:
        packed["val"] = opened.val
    sources = {name: s for name, s in packed.items() if isinstance(s, PackedSource)}
    if len(sources) < len(packed):  # `shapes` are a seed, and not worth a file
        return _Offer("", opened)
    needed = sum(source.nbytes for source in sources.values())
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > _SPARE * needed
    folder = tempfile.mkdtemp(prefix="comask-", dir=MEMORY if room else None)
    for name, source in sources.items():
        Path(folder, name).mkdir()
        source.save(Path(folder, name))
    return _Offer(folder, opened.without_sources())
