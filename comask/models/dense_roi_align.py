"""RoIAlign as matrix products, for training on a CPU with small maps."""

from __future__ import annotations

import torch
from torch import Tensor

DENSE_AREA = 64 * 64  # largest map, in feature pixels, that it is for


def dense_roi_align(
    features: Tensor, rows: Tensor, output_size: int, scale: float, sampling_ratio: int
) -> Tensor:
    """RoIAlign as two matrix products: bilinear sampling is separable.

    For training on a CPU with small maps, where torchvision's backward scatters with one thread
    (`benchmarks/roi_align.py` compares them).

    Args:
        features: [B, C, H, W].
        rows: [R, 5] f32, image index and `xyxy` in pixels.
        output_size: S.
        scale: feature pixels a pixel.
        sampling_ratio: samples a bin and axis.

    Returns:
        [R, C, S, S].
    """
    channels, height, width = features.shape[1:]
    x1, y1, x2, y2 = (rows[:, 1:] * scale - 0.5).unbind(1)
    along_y = _sampling_matrix(y1, y2, output_size, sampling_ratio, height)
    along_x = _sampling_matrix(x1, x2, output_size, sampling_ratio, width)
    places = [torch.where(rows[:, 0] == image)[0] for image in range(len(features))]
    parts = []
    for plane, place in zip(features, places, strict=True):
        columns = plane.permute(1, 0, 2).reshape(height, channels * width)
        part = along_y[place].flatten(0, 1) @ columns
        part = part.view(len(place), output_size * channels, width) @ along_x[place].transpose(1, 2)
        parts.append(part.view(len(place), output_size, channels, output_size).transpose(1, 2))
    return torch.cat(parts)[torch.cat(places).argsort()]


def _sampling_matrix(
    start: Tensor, end: Tensor, output_size: int, sampling_ratio: int, length: int
) -> Tensor:
    """[R, S, length]: how much each feature pixel adds to each bin between `start` and `end`, [R]."""
    samples = output_size * sampling_ratio
    share = (torch.arange(samples, device=start.device) + 0.5) / samples
    position = start[:, None] + (end - start)[:, None] * share
    inside = (position >= -1) & (position <= length)  # farther out a sample counts as zero
    pixel = torch.arange(length, device=start.device)
    distance = (position.clamp(0, length - 1)[..., None] - pixel).abs()
    weights = (1 - distance).clamp(min=0) * inside[..., None]
    means: Tensor = weights.unflatten(1, (output_size, sampling_ratio)).mean(2)
    return means
