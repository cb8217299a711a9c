"""The ResNet against torchvision's, what trains in it, and loading its weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from comask.errors import CheckpointError
from comask.models.backbone import ResNet
from comask.models.pretrained import load_backbone_weights

STAGES = ("conv1 bn1", "layer1", "layer2", "layer3", "layer4")


def backbone(name: str = "resnet18", *, freeze: bool = True, frozen_stages: int = 0) -> ResNet:
    return ResNet(name, freeze_batch_norm=freeze, frozen_stages=frozen_stages)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_from_a_file_give_torchvisions_features(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    ours = backbone(name).eval()
    load_backbone_weights(ours, name, str(path))
    x = torch.randn(2, 3, 64, 96)
    features = []
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            expected = layer(expected)
            features.append(expected)
        actual = ours(x)
    assert ours.out_channels == tuple(f.shape[1] for f in features)
    for i, (a, b) in enumerate(zip(actual, features, strict=True)):
        assert a.shape[2:] == (64 // 2 ** (i + 2), 96 // 2 ** (i + 2))
        torch.testing.assert_close(a, b)


def test_weights_without_the_classifier_load_too(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    ours = backbone()
    load_backbone_weights(ours, "resnet18", str(path))
    assert torch.equal(ours.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_source_none_leaves_the_weights() -> None:
    ours = backbone()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    load_backbone_weights(ours, "resnet18", "none")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def truncated(path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    path.write_bytes(path.read_bytes()[:10_000])


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no weights\n" * 50),
    "html": lambda path: path.write_text("<html>404</html>\n"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "truncated": truncated,
    "list": lambda path: torch.save([torch.zeros(2)], path),
    "object": lambda path: torch.save(nn.Linear(2, 2), path),
    "other network": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "numbered": lambda path: torch.save({0: torch.zeros(2)}, path),
    "other shapes": lambda path: torch.save(
        torchvision.models.resnet34(weights=None).state_dict(), path
    ),
    "numbers": lambda path: torch.save(dict.fromkeys(backbone().state_dict(), 1.0), path),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_file_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    BROKEN[kind](path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        load_backbone_weights(backbone(), "resnet18", str(path))
    assert "\n" not in str(caught.value)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    torch.manual_seed(1)
    for freeze in (True, False):
        net = backbone(freeze=freeze)
        net.train()
        before = {key: value.clone() for key, value in net.named_buffers()}
        out = net(torch.randn(2, 3, 64, 64))
        out[-1].sum().backward()
        same = [torch.equal(value, before[key]) for key, value in net.named_buffers()]
        assert all(same) if freeze else not any(same)
        assert net.training
        assert net.bn1.weight.grad is not None
        net.eval()
        assert not any(module.training for module in net.modules())


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
