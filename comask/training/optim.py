"""Optimiser, learning rate and averaged weights (section 4.1; the recipe in docs/algorithm.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from comask.config import TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(
    model: nn.Module, config: TrainConfig, stages: Sequence[Sequence[nn.Module]] = ()
) -> torch.optim.Optimizer:
    """Returns SGD with momentum, as in the paper, or AdamW, for the parameters with a gradient.

    Each group of parameters has a `rate_factor`, by which the step's learning rate is multiplied.

    Args:
        model: the model.
        config: the settings of the optimiser.
        stages: the layers of the backbone's stem and stages, whose rates `layer_decay` lowers.
    """
    factors = {
        parameter: config.layer_decay ** (len(stages) - depth)
        for depth, stage in enumerate(stages)
        for layer in stage
        for parameter in layer.parameters()
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    if config.optimizer == "adamw":  # its first two groups have this order in all checkpoints
        groups = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Decoupled decay would pull norm scales and the offsets' bias to zero, so AdamW decays only
            # matrices and kernels.
            decayed = config.optimizer == "sgd" or (parameter.ndim > 1 and "bias" not in name)
            groups.setdefault((factors.get(parameter, 1.0), decayed), []).append(parameter)
    described = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate_factor": factor,
        }
        for (factor, decayed), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(described, lr=0.0, momentum=config.momentum)
    return torch.optim.AdamW(described, lr=0.0, betas=(0.9, config.adamw_beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of each group of parameters to `rate` times its `rate_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)  # older checkpoints lack the factor


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the rate of optimiser step `step` (from 0): linear warm-up, then steps or a half cosine.

    `config.learning_rate` is scaled by batch size over `config.reference_batch`.
    """
    peak = config.learning_rate * config.batch_size / config.reference_batch
    if config.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs)
        rate = peak * config.step_factor**passed
    else:
        progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
        rate = peak * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    if step < config.warmup_steps:
        rate *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps
    return rate


def average_weights(model: nn.Module, decay: float) -> AveragedModel | None:
    """Returns an exponential moving average of weights and buffers; None for a decay of 0.

    After n steps, the decay is at most (1 + n) / (10 + n), so that an early average quickly forgets the
    random start (as in TensorFlow's ExponentialMovingAverage).
    """
    if not decay:
        return None

    @torch.no_grad()
    def update(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(averages, values, 1 - now)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True).eval()
