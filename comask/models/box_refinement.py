"""Refines proposals to boxes with the collaborative head (section 3.2 of the paper).

A coarse mask weighs the boxes that the cells of a RoI predict; their weighted average is the refined box.

Legend: R RoIs, K classes; a *cell* is one of the 7×7 places of a RoI. Boxes are f32
`xyxy` in pixels of the resized image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comask.config import ModelConfig
from comask.models.precision import FloatTensors, with_norm

POOL_SIZE = 14
CELLS = 7
MASK_SIZE = 28


class ClassConv2d(nn.Conv2d):
    """A convolution of stride 1 that computes one output channel for each of its inputs.

    Of the masks of all classes, only that of a RoI's own class is read. The channel's kernel is applied
    as a matrix product over the input channels, [k·k, C] × [C, H·W], whose k·k rows are then shifted to
    their places and added.
    """

    def forward(self, x: Tensor, channels: Tensor) -> Tensor:  # type: ignore[override]
        """Maps [R, C, H, W] and channels [R] i64 to [R, H, W] f32, channel `channels[i]` of input i."""
        height, width = x.shape[2:]
        size, padding = int(self.kernel_size[0]), int(self.padding[0])
        kernels = self.weight.permute(0, 2, 3, 1).flatten(1, 2)[channels]
        # in f32, since in f16 the sum of the products would be rounded once for each place of the kernel
        products = (kernels @ x.flatten(2)).float().unflatten(1, (size, size))
        products = F.pad(products.unflatten(3, (height, width)), (padding,) * 4)
        assert self.bias is not None
        shifted = products[:, :, 0, :, :width]
        for column in range(1, size):
            shifted = shifted + products[:, :, column, :, column : column + width]
        out = self.bias.float()[channels][:, None, None]
        for row in range(size):
            out = out + shifted[:, row, row : row + height]
        return out


class HeadOutputs(NamedTuple):
    """What the head computes for each RoI.

    Attributes:
        masks: [R, 28, 28] f32, the logits of the mask of the RoI's own class.
        offsets: [R, 4, 7, 7] f32, each cell's box; see `decode_cells`.
        features: [R, C, 7, 7], from which both are computed.
    """

    masks: Tensor
    offsets: Tensor
    features: Tensor


class CollaborativeHead(FloatTensors):
    """The head that predicts class masks at 28×28 and box offsets at 7×7 from 14×14 RoI features.

    Mask channel 0 is an unused background; class label k has channel k + 1.

    Args:
        config: the network's settings.
        regress: whether to predict offsets; a head for masks alone does not.
    """

    def __init__(self, config: ModelConfig, *, regress: bool = True) -> None:
        super().__init__()
        channels, kernel = config.head_channels, config.mask_kernel
        layers: list[nn.Module] = []
        for i in range(config.head_convs + 1):
            before, stride = (config.channels, 2) if i == 0 else (channels, 1)
            conv = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
            layers += with_norm(conv, config.norm_groups)
        self.refine = nn.Sequential(*layers)
        layers = []
        for _ in range(2):
            deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
            layers += with_norm(deconv, config.norm_groups)
        self.upsample = nn.Sequential(*layers)
        self.mask = ClassConv2d(channels, config.num_classes + 1, kernel, padding=kernel // 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # With few output channels, fan_out would make the weights and thus the first masks too large.
        nn.init.kaiming_normal_(self.mask.weight, mode="fan_in", nonlinearity="relu")
        self.activation = config.offset_activation
        self.regress = regress
        if regress:
            self.offsets = nn.Conv2d(channels, 4, 3, padding=1, bias=False)
            nn.init.normal_(self.offsets.weight, std=0.001)
            # With a bias per cell, each cell's box is the RoI at first. From zero offsets, the IoU would
            # have no gradient; with one bias for all cells, their positions would have to be learned.
            start = roi_offsets()
            self.offset_bias = nn.Parameter(start.log() if self.activation == "exp" else start)

    def forward(self, pooled: Tensor, labels: Tensor) -> HeadOutputs:
        """Maps RoI features [R, C, 14, 14] and labels [R] i64, from 0, to masks and offsets.

        A head for masks alone returns the offsets of the RoI itself.
        """
        hidden = self.refine(pooled)
        masks = self.mask(self.upsample(hidden), labels + 1)
        if not self.regress:
            same = roi_offsets().to(pooled.device).expand(pooled.shape[0], -1, -1, -1)
            return HeadOutputs(masks, same, hidden)
        # The bias is most of an offset; in f16 its rounding would shift boxes by up to 1/4096 of the RoI.
        offsets = self.offsets(hidden).float() + self.offset_bias
        if self.activation == "relu":
            offsets = F.relu(offsets)
        elif self.activation == "exp":
            offsets = torch.exp(offsets)
        return HeadOutputs(masks, offsets, hidden)


def roi_offsets() -> Tensor:
    """Returns the offsets [4, 7, 7] with which every cell decodes to its RoI."""
    place = (torch.arange(CELLS) + 0.5) / CELLS
    x, y = place.expand(CELLS, CELLS), place[:, None].expand(CELLS, CELLS)
    return torch.stack((x, 1 - x, y, 1 - y))


def decode_cells(offsets: Tensor, rois: Tensor) -> Tensor:
    """Returns the box that each cell predicts: (l_i, t_i, r_i, b_i) of section 3.2.

    Cell (row i, column j) lies at x = x₁ + w(j + ½)/7, y = y₁ + h(i + ½)/7. Its four offsets are the
    distances to the left, right, top and bottom edges in units of the RoI's width or height.

    Args:
        offsets: [R, 4, 7, 7] in l, r, t, b order.
        rois: [R, 4].

    Returns:
        [R, 7, 7, 4].
    """
    offsets = offsets.float()
    place = (torch.arange(CELLS, device=rois.device, dtype=rois.dtype) + 0.5) / CELLS
    x1, y1, x2, y2 = rois[:, :, None, None].unbind(1)  # each [R, 1, 1]
    w, h = x2 - x1, y2 - y1
    x, y = x1 + w * place[None, None, :], y1 + h * place[None, :, None]
    left, right, top, bottom = offsets.unbind(1)
    return torch.stack((x - left * w, y - top * h, x + right * w, y + bottom * h), dim=-1)


def cell_confidence(mask_logits: Tensor, pooling: str = "sigmoid") -> Tensor:
    """Averages masks over 4×4 pixels, which gives M_s of section 3.2, [R, 7, 7] in 0..1.

    Args:
        mask_logits: [R, 28, 28].
        pooling: `sigmoid` averages probabilities, `logit` averages logits, `bilinear` samples the
            probabilities at each cell's centre.
    """
    logits = mask_logits.float()[:, None]
    step = MASK_SIZE // CELLS
    if pooling == "logit":
        return torch.sigmoid(F.avg_pool2d(logits, step))[:, 0]
    probabilities = torch.sigmoid(logits)
    if pooling == "bilinear":
        return F.interpolate(probabilities, size=(CELLS, CELLS), mode="bilinear")[:, 0]
    return F.avg_pool2d(probabilities, step)[:, 0]


def cell_weights(confidence: Tensor, threshold: float, empty: str = "confidence") -> Tensor:
    """Returns the weights of the cells' boxes: M_s where M_s > threshold, else 0 (section 3.2).

    Args:
        confidence: M_s, [R, 7, 7] in 0..1.
        threshold: the threshold, 0.5 in the paper.
        empty: the weights of a RoI without a cell above the threshold. `confidence` uses M_s of all
            cells, since every object has pixels; `proposal` uses 0, which keeps the proposal.

    Returns:
        [R, 7, 7] f32 in 0..1.
    """
    foreground = torch.where(confidence > threshold, confidence, 0.0)
    if empty == "proposal":
        return foreground
    nothing = foreground.sum(dim=(1, 2), keepdim=True) == 0
    return torch.where(nothing, confidence, foreground)


def average_box(cell_boxes: Tensor, weights: Tensor, rois: Tensor) -> Tensor:
    """Averages boxes: l = Σ l_i M_s(x_i, y_i) / Σ M_s(x_i, y_i), likewise t, r, b (equations 8 and 9).

    Args:
        cell_boxes: [R, 7, 7, 4].
        weights: [R, 7, 7] ≥ 0.
        rois: [R, 4], returned where all weights are 0.

    Returns:
        [R, 4].
    """
    total = weights.sum(dim=(1, 2))
    weighted = (cell_boxes * weights[..., None]).sum(dim=(1, 2))
    mean = weighted / total.clamp(min=1e-6)[:, None]
    return torch.where(total[:, None] > 1e-6, mean, rois)
