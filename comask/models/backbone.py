"""The backbone: torchvision's ResNet without its classifier.

Legend: B batch, H and W the padded image's height and width in pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock

from comask.models.precision import GroupNorm

GROUPS = 32  # GroupNorm's groups, as in its paper (Wu and He, ECCV 2018)


class SlimResNet(torchvision.models.ResNet):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's ResNet with stages of half the width; the stem keeps its 64 channels."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        return super()._make_layer(block, planes // 2, *args, **kwargs)


def build_resnet(
    name: str, norm_layer: Any = nn.BatchNorm2d
) -> tuple[torchvision.models.ResNet, tuple[int, ...]]:
    """Builds torchvision's `resnet18`, `resnet50`, `resnet101` or a `resnet18-slim`, untrained.

    Residual branches start at zero, which keeps the signal's magnitude through 16 and more blocks. That
    matters without ImageNet's weights, since frozen statistics cannot rescale the signal.

    Returns:
        The network and the channels of C2..C5.
    """
    if name == "resnet18-slim":
        net = SlimResNet(BasicBlock, [2, 2, 2, 2], zero_init_residual=True, norm_layer=norm_layer)
        return net, (32, 64, 128, 256)
    net = torchvision.models.get_model(
        name, weights=None, zero_init_residual=True, norm_layer=norm_layer
    )
    return net, tuple(net.fc.in_features >> shift for shift in (3, 2, 1, 0))


class ResNet(nn.Module):
    """A ResNet that returns C2..C5 (strides 4, 8, 16, 32).

    Module names are torchvision's, so that its checkpoints load without changes.

    Args:
        name: the network, as for `build_resnet`.
        norm: `frozen` is BatchNorm that keeps its running statistics in training (scale and shift stay
            trainable), `batch` is BatchNorm that updates them, `group` is GroupNorm of GROUPS groups.
        frozen_stages: the number of stages, counted from the stem, that are not trained.
    """

    def __init__(
        self, name: str, *, norm: Literal["frozen", "batch", "group"], frozen_stages: int
    ) -> None:
        super().__init__()
        layer = partial(GroupNorm, GROUPS) if norm == "group" else nn.BatchNorm2d
        net, self.out_channels = build_resnet(name, layer)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.norm = norm
        stem = nn.ModuleList([self.conv1, self.bn1])
        for stage in [stem, self.layer1, self.layer2, self.layer3, self.layer4][:frozen_stages]:
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNet:
        """Switches the mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps normalised images [B, 3, H, W] to C2..C5, each [B, C_i, H/2^i, W/2^i]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


def fold_batch_norms(net: ResNet) -> None:
    """Folds each BatchNorm's running statistics into the convolution before it, in place, for inference.

    Fold before `half()`, since variances range from 1e-6 to 1e6, which f16 cannot represent.

    Args:
        net: a network in evaluation mode.
    """
    pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"))
    for module in list(net.modules()):
        layers = dict(module.named_children())
        for conv_name, norm_name in pairs:
            conv, norm = layers.get(conv_name), layers.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
