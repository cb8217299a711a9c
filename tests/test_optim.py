"""Learning rates, optimisers and averaged weights against formulas."""

from __future__ import annotations

import pytest
import torch

from comask.config import TrainConfig
from comask.presets import preset
from comask.training.optim import average_weights, build_optimizer, learning_rate


def test_paper_schedule() -> None:
    config = preset("comask-r50").train
    steps = 1000  # an epoch
    rate = [learning_rate(config, s, steps, 24 * steps) for s in range(0, 24 * steps, 500)]
    assert rate[0] == pytest.approx(0.01 / 80)
    assert rate[1] == pytest.approx(0.01 * (1 / 80 + (79 / 80) * 0.5))
    assert rate[2] == rate[39] == 0.01
    assert rate[40] == pytest.approx(0.001)
    assert rate[46] == pytest.approx(0.0001)
    double = TrainConfig(batch_size=16)
    assert learning_rate(double, 5000, steps, 24 * steps) == pytest.approx(0.02)


def test_one_cycle_rises_and_falls_to_zero() -> None:
    config = TrainConfig(schedule="one_cycle", warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step, 100, 100) for step in range(101)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == 0


def test_optimizers_take_what_has_a_gradient() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    sgd = build_optimizer(model, TrainConfig())
    assert sgd.defaults["momentum"] == 0.9
    assert [p.shape for p in sgd.param_groups[0]["params"]] == [(2, 2), (2,)]
    adamw = build_optimizer(model, TrainConfig(optimizer="adamw"))
    assert [group["weight_decay"] for group in adamw.param_groups] == [1e-4, 0.0]


def test_averaged_weights_follow_the_formula() -> None:
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm1d(3)
    average = average_weights(layer, 0.6)
    assert average is not None
    mine = layer.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            layer.weight.normal_()
            layer.running_mean.normal_()
            layer.num_batches_tracked += 1
        average.update_parameters(layer)
        # the first update copies
        decay = min(0.6, (1 + step) / (10 + step)) if step else 0.0
        mine = decay * mine + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(average.module.weight.detach(), mine)
        assert average.module.num_batches_tracked == layer.num_batches_tracked
    assert average_weights(layer, 0.0) is None
