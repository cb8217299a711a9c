"""The backbones: torchvision's ResNet and ConvNeXt without their classifiers.

Legend: B batch, H and W the padded image's height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock
from torchvision.ops import StochasticDepth

from comask.config import ModelConfig
from comask.models.precision import GroupNorm, LayerNorm

GROUPS = 32  # GroupNorm's groups, as in its paper (Wu and He, ECCV 2018)


class Backbone(nn.Module):
    """A network that returns C2..C5 (strides 4, 8, 16, 32).

    Attributes:
        out_channels: the channels of C2..C5.
        recompute: whether training keeps only the features between stages and computes the rest again in
            the backward pass, which saves memory and takes time.
    """

    out_channels: tuple[int, ...]
    recompute: bool = False

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """Returns the layers of the stem and of the four stages."""
        raise NotImplementedError

    def fold(self) -> None:
        """Folds what inference does not need into the convolutions before it, in place.

        A backbone in which nothing can be folded stays as it is.
        """

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps normalised images [B, 3, H, W] to C2..C5, each [B, C_i, H/2^i, W/2^i]."""
        stem, *stages = self.stages()
        x = _chain(stem, images)
        features = []
        for stage in stages:
            if self.recompute and self.training:
                x = checkpoint(_chain, stage, x, use_reentrant=False)
            else:
                x = _chain(stage, x)
            features.append(x)
        return features


def _chain(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def build_backbone(config: ModelConfig) -> Backbone:
    """Builds the backbone of a network, untrained, with its first stages frozen."""
    if config.backbone == "convnext_tiny":
        net: Backbone = ConvNeXt()
    else:
        net = ResNet(config.backbone, norm=config.backbone_norm)
    for stage in net.stages()[: config.frozen_stages]:
        for layer in stage:
            layer.requires_grad_(False)
    return net


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


class ResNet(Backbone):
    """A ResNet, whose module names are torchvision's, so that its checkpoints load without changes.

    Args:
        name: the network, as for `build_resnet`.
        norm: `frozen` is BatchNorm that keeps its running statistics in training (scale and shift stay
            trainable), `batch` is BatchNorm that updates them, `group` is GroupNorm of GROUPS groups.
    """

    def __init__(self, name: str, *, norm: Literal["frozen", "batch", "group"]) -> None:
        super().__init__()
        layer = partial(GroupNorm, GROUPS) if norm == "group" else nn.BatchNorm2d
        net, self.out_channels = build_resnet(name, layer)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.norm = norm

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """Returns the layers of the stem and of the four stages."""
        stem = [self.conv1, self.bn1, self.relu, self.maxpool]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def train(self, mode: bool = True) -> ResNet:
        """Switches the mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def fold(self) -> None:
        """Folds each BatchNorm's running statistics into the convolution before it.

        Fold before `half()`, since variances range from 1e-6 to 1e6, which f16 cannot represent.
        """
        pairs = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"))
        for module in list(self.modules()):
            layers = dict(module.named_children())
            for conv_name, norm_name in pairs:
                conv, norm = layers.get(conv_name), layers.get(norm_name)
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                    setattr(module, norm_name, nn.Identity())


class ConvNeXtBlock(nn.Module):
    """A block of ConvNeXt (Liu et al., CVPR 2022, section 2.6), whose names are torchvision's.

    Its fully connected layers are 1×1 convolutions, which compute the same and which INT8 and TensorRT
    treat like all others.

    Args:
        channels: of the input and the output.
        drop: the probability that training leaves the block out for an image.
    """

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            nn.Identity(),  # torchvision's places of a permutation
            LayerNorm(channels),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )
        # It is not folded into the convolution, whose weights would then leave f16's range.
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.stochastic_depth = StochasticDepth(drop, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, h, w] to the same shape."""
        scaled: Tensor = self.stochastic_depth(self.layer_scale * self.block(x))
        return x + scaled


class ConvNeXt(Backbone):
    """ConvNeXt-T. C2..C5 have a LayerNorm each, as in its authors' detectors.

    Module names are torchvision's, so that its checkpoints load, see `comask.training.weight_files`.
    """

    DEPTHS = (3, 3, 9, 3)
    DROP = 0.1  # of the last block; it grows linearly from 0, as in torchvision

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = (96, 192, 384, 768)
        first = self.out_channels[0]
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, first, 4, stride=4), LayerNorm(first))
        ]
        blocks = sum(self.DEPTHS)
        drops = (self.DROP * i / (blocks - 1) for i in range(blocks))
        for i, (depth, channels) in enumerate(zip(self.DEPTHS, self.out_channels, strict=True)):
            if i:
                before = self.out_channels[i - 1]
                layers.append(
                    nn.Sequential(LayerNorm(before), nn.Conv2d(before, channels, 2, stride=2))
                )
            layers.append(
                nn.Sequential(*(ConvNeXtBlock(channels, next(drops)) for _ in range(depth)))
            )
        self.features = nn.Sequential(*layers)
        self.norms = nn.ModuleList(LayerNorm(channels) for channels in self.out_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """Returns the layers of the stem and of the four stages; all but the first halve the map."""
        stem, first, *rest = self.features
        return [[stem], [first], *(rest[i : i + 2] for i in range(0, len(rest), 2))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps normalised images [B, 3, H, W] to C2..C5, each [B, C_i, H/2^i, W/2^i]."""
        features = super().forward(images)
        return [norm(c) for norm, c in zip(self.norms, features, strict=True)]
