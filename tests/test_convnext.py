"""ConvNeXt: torchvision's network and weights, its learning rates, and every step up to an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run, settings
from from_training_to_engines import go_from_training_to_engines
from torch import Tensor, nn

from comask.config import ModelConfig, TrainConfig
from comask.models.backbone import ConvNeXt, build_backbone
from comask.models.comask import CoMask
from comask.presets import PRESETS, preset
from comask.training.auto_batch import trial
from comask.training.import_weights import import_weights
from comask.training.losses import Objective
from comask.training.optim import build_optimizer, set_learning_rate

CONVNEXT = (
    "model.backbone=convnext_tiny", "model.backbone_norm=frozen", "model.channels=32",
    "model.head_channels=32", "model.head_convs=2", "model.classifier_width=64", "model.detections=8",
    "data.shapes_train=4", "data.shapes_val=2", "train.batch_size=2", "train.epochs=1",
    "train.evaluate_every=0", "train.layer_decay=0.8",
)  # fmt: skip


def torchvisions() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny(weights=None).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.normal_(
                parameter, std=0.5
            )  # else blocks would hardly change what they are given
    return net


def test_features_are_torchvisions(tmp_path: Path) -> None:
    theirs = torchvisions()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    model = CoMask(ModelConfig(backbone="convnext_tiny"), preset("comask-r50").preprocess)
    report = import_weights(model, str(tmp_path / "w.pt"), ())
    assert report.layout == "torchvision ConvNeXt"
    assert all(name.startswith("classifier.") for name in report.left)
    ours = model.backbone.eval()
    assert isinstance(ours, ConvNeXt)
    x = torch.randn(2, 3, 64, 96)
    expected: list[Tensor] = []
    with torch.no_grad():
        y = x
        for place, layer in enumerate(theirs.features):  # type: ignore[arg-type, union-attr]
            y = layer(y)
            if place % 2:
                expected.append(F.layer_norm(y.movedim(1, 3), y.shape[1:2], eps=1e-6).movedim(3, 1))
        found = ours(x)
    assert [f.shape[1] for f in found] == list(ours.out_channels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(torchvisions().state_dict(), tmp_path / "w.pt")
    output = tmp_path / "run"
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", output,
                 *settings(f"train.weights={tmp_path / 'w.pt'}"))  # fmt: skip
    assert result.exit_code == 1
    assert "its backbone is not model.backbone=resnet18-slim" in result.output


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("backbone", ["resnet18-slim", "convnext_tiny"])
def test_rates_fall_towards_the_stem(backbone: str, optimizer: str) -> None:
    net = build_backbone(ModelConfig(backbone=backbone, frozen_stages=0))  # type: ignore[arg-type]
    model = nn.ModuleDict({"backbone": net, "head": nn.Linear(2, 2)})
    config = TrainConfig(optimizer=optimizer, layer_decay=0.5)  # type: ignore[arg-type]
    built = build_optimizer(model, config, net.stages())
    set_learning_rate(built, 8.0)
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model["head"].parameters()} == {8.0}
    for depth, stage in enumerate(net.stages()):
        found = {rates[id(p)] for layer in stage for p in layer.parameters()}
        assert found == {8.0 * 0.5 ** (5 - depth)}
    assert len(rates) == len(list(model.parameters()))


def test_recomputed_activations_change_no_gradient() -> None:
    """Not even with stochastic depth, whose choices are drawn once."""
    config = preset("shapes-tiny")
    torch.manual_seed(1)
    network = ModelConfig(**{
        name: getattr(config.model, name) for name in config.model.__dataclass_fields__
    } | {"backbone": "convnext_tiny", "backbone_norm": "frozen"})  # fmt: skip
    model = CoMask(network, config.preprocess).train()
    images, sizes, targets = trial(config, 2)
    gradients = []
    for recompute in (False, True):
        model.backbone.recompute = recompute
        model.zero_grad()
        torch.manual_seed(5)
        torch.stack(list(Objective(model)(images, sizes, targets).values())).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 100
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputing_batch_norm_is_refused(tmp_path: Path) -> None:
    result = run("train", "--data", "shapes", "--preset", "shapes-tiny", "--output", tmp_path / "run",
                 *settings("train.checkpoint_activations=true"))  # fmt: skip
    assert result.exit_code == 1
    assert "would update BatchNorm's statistics twice" in result.output


def test_recipes_are_whole_and_differ_from_the_papers() -> None:
    plus, paper = PRESETS["comask-r50-plus"], PRESETS["comask-r50"]
    assert plus.data.scale_range == (0.1, 2.0)
    assert (plus.train.epochs, plus.train.weights) == (100, "imagenet-v2")
    assert paper.data.scale_range == (1.0, 1.0)
    assert PRESETS["comask-convnext-t"].model.backbone == "convnext_tiny"


@pytest.mark.slow
def test_from_training_to_engines(tmp_path: Path) -> None:
    go_from_training_to_engines(tmp_path, CONVNEXT)
