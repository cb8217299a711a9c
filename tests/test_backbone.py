"""The ResNet: its norm layers, and what trains in it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from comask.config import ModelConfig
from comask.models.backbone import GROUPS, ResNet, build_backbone

STAGES = ("conv1 bn1", "layer1", "layer2", "layer3", "layer4")
Norm = Literal["frozen", "batch", "group"]
Name = Literal["resnet18", "resnet18-slim"]


def backbone(name: Name = "resnet18", *, norm: Norm = "frozen", frozen_stages: int = 0) -> ResNet:
    config = ModelConfig(backbone=name, backbone_norm=norm, frozen_stages=frozen_stages)
    net = build_backbone(config)
    assert isinstance(net, ResNet)
    return net


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    torch.manual_seed(1)
    for norm in ("frozen", "batch"):
        net = backbone(norm=norm)
        net.train()
        before = {key: value.clone() for key, value in net.named_buffers()}
        out = net(torch.randn(2, 3, 64, 64))
        out[-1].sum().backward()
        same = [torch.equal(value, before[key]) for key, value in net.named_buffers()]
        assert all(same) if norm == "frozen" else not any(same)
        assert net.training
        assert net.bn1.weight.grad is not None
        net.eval()
        assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet18-slim"])
def test_group_norm_makes_an_image_independent_of_its_batch(name: Name) -> None:
    torch.manual_seed(3)
    net = backbone(name, norm="group").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    groups = {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {GROUPS}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for one, both in zip(net(images[:1]), net(images), strict=True):
            torch.testing.assert_close(one, both[:1])


@pytest.mark.parametrize("frozen_stages", [0, 1, 2, 5])
def test_frozen_stages_take_no_gradient(frozen_stages: int) -> None:
    torch.manual_seed(2)
    net = backbone(frozen_stages=frozen_stages)
    net.train()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    sum(feature.sum() for feature in net(images)).backward()
    for i, stage in enumerate(STAGES):
        gradients = [p.grad for name in stage.split() for p in getattr(net, name).parameters()]
        assert gradients
        assert all((g is None) == (i < frozen_stages) for g in gradients)
