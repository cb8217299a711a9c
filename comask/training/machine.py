"""Fits a model to the machine it trains on, or says why that is not possible."""

from __future__ import annotations

from torch import nn

from comask.config import Config
from comask.errors import ConfigError
from comask.models.comask import CoMask
from comask.training.distributed import Ranks


def fit_to_machine(model: CoMask, config: Config, ranks: Ranks) -> CoMask:
    """`model` on the device of `ranks`, with BatchNorm that sees all processes' images.

    Raises:
        ConfigError: when a setting cannot be honoured on this machine.
    """
    train, cpu = config.train, ranks.device.type == "cpu"
    if train.batch_size % ranks.world:
        raise ConfigError(
            f"train.batch_size={train.batch_size}: expected a multiple of the {ranks.world} processes"
        )
    if train.precision == "fp16" and cpu:
        raise ConfigError("train.precision=fp16: needs a GPU; on a CPU give bf16 or fp32")
    model.to(ranks.device)
    if config.model.backbone_norm == "batch" and ranks.world > 1:
        if cpu:
            raise ConfigError(
                "model.backbone_norm=batch: several processes need GPUs for it, since PyTorch "
                "synchronises BatchNorm there only; give group or frozen, or one process"
            )
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(synced, CoMask)
        model = synced
    return model
