"""Reads weight files of torchvision, mmdetection and comask, and renames their weights to CoMask's names.

A file's layout is recognised by the names in it, and nothing in a file is ever executed.

Images must be normalised in the way that the weights were trained with. torchvision and mmdetection's
`pytorch` style take RGB in 0..1, subtract a mean and divide by a standard deviation; `PreprocessConfig`
has the same numbers times 255. A ResNet in Caffe's style (BGR, no standard deviation, the stride in
another convolution) is another network with the same names. A file of mmdetection whose configuration
states this style is rejected; a file without a configuration cannot be recognised as such.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from comask.data.source import Category
from comask.errors import CheckpointError
from comask.training.checkpoint import load_checkpoint, read_torch_file, why_unreadable

KNOWN = (
    "a comask checkpoint, torchvision's ResNet, ConvNeXt, Mask R-CNN or Faster R-CNN, or mmdetection's "
    "ResNet with FPN"
)
CAFFE = re.compile(r"to_rgb\W+False|style\W+caffe")  # searched in mmdetection's configuration
OTHERWISE = "built otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """Weights under CoMask's names.

    Attributes:
        layout: the layout's title, for messages.
        values: our name → value; a given model may lack the name or have another shape.
        names: our name → the file's name.
        left: the file's names that CoMask has no place for → the reason, or "" without a special one.
        settings: the known fields of the `ModelConfig` of the network that the weights belong to.
        categories: the network's classes in label order; empty if unknown.
    """

    layout: str
    values: dict[str, Tensor]
    names: dict[str, str]
    left: dict[str, str]
    settings: dict[str, Any]
    categories: tuple[Category, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout of a weight file, and the patterns that turn its names into ours.

    Attributes:
        title: the layout's title, for messages.
        marks: prefixes of names that identify this layout, if no layout before it matches.
        names: pairs of a pattern and our name; CoMask has no place for a name that matches no pattern.
        whole: (prefix, number of values) of modules that are taken as a whole or not at all. A module
            with other values is a different one (with normalisation, deeper, on other levels).
    """

    title: str
    marks: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    whole: tuple[tuple[str, int], ...] = ()


# Values can be copied unchanged if names match: in all layouts, objectness has one channel per anchor,
# deltas are (dx, dy, dw, dh) anchor by anchor and unscaled, and the anchors' aspect ratios (height by
# width) are in the order of OTHERS_RATIOS. The sizes of anchors may differ, since deltas are relative to
# them. The first fully connected layer reads [C, 7, 7] flattened in this order.
OTHERS_RATIOS = (0.5, 1.0, 2.0)
COMASK = Layout(
    title="comask weights without class names", marks=("mfpn.",), names=((r"(.+)", r"\1"),)
)
RESNET = Layout(
    title="torchvision ResNet",
    marks=("layer1.",),
    names=((r"((?:conv1|bn1|layer[1-4])\..+)", r"backbone.\1"),),
)
CONVNEXT = Layout(
    title="torchvision ConvNeXt",
    marks=("features.1.0.layer_scale",),
    names=((r"(features\..+)", r"backbone.\1"),),
)
TORCHVISION = Layout(
    title="torchvision detector",
    marks=("backbone.body.",),
    names=(
        (r"backbone\.body\.(.+)", r"backbone.\1"),
        # torchvision ≥ 0.13 has the optional parts.
        (r"backbone\.fpn\.inner_blocks\.([0-3])(?:\.0)?\.(weight|bias)", r"mfpn.fpn.lateral.\1.\2"),
        (r"backbone\.fpn\.layer_blocks\.([0-3])(?:\.0)?\.(weight|bias)", r"mfpn.fpn.output.\1.\2"),
        (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn.conv.\1"),
        (r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.objectness.\1"),
        (r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.deltas.\1"),
        (r"roi_heads\.box_head\.fc6\.(weight|bias)", r"classifier.fc1.\1"),
        (r"roi_heads\.box_head\.fc7\.(weight|bias)", r"classifier.fc2.\1"),
    ),
    whole=(("backbone.fpn.", 16), ("rpn.head.", 6), ("roi_heads.box_head.", 4)),
)
MASK_RCNN = dataclasses.replace(
    TORCHVISION, title="torchvision Mask R-CNN", marks=("roi_heads.mask_head.",)
)
MMDETECTION = Layout(
    title="mmdetection",
    marks=("backbone.", "neck.", "rpn_head."),
    names=(
        (r"backbone\.(.+)", r"backbone.\1"),
        (r"neck\.lateral_convs\.([0-3])\.conv\.(weight|bias)", r"mfpn.fpn.lateral.\1.\2"),
        (r"neck\.fpn_convs\.([0-3])\.conv\.(weight|bias)", r"mfpn.fpn.output.\1.\2"),
        (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.conv.\1"),
        (r"rpn_head\.rpn_cls\.(weight|bias)", r"rpn.objectness.\1"),
        (r"rpn_head\.rpn_reg\.(weight|bias)", r"rpn.deltas.\1"),
        # mmdetection 1 has no `roi_head`
        (r"(?:roi_head\.)?bbox_head\.shared_fcs\.0\.(weight|bias)", r"classifier.fc1.\1"),
        (r"(?:roi_head\.)?bbox_head\.shared_fcs\.1\.(weight|bias)", r"classifier.fc2.\1"),
    ),
    whole=(
        ("neck.", 16), ("rpn_head.", 6), ("roi_head.bbox_head.shared_", 4), ("bbox_head.shared_", 4),
    ),
)  # fmt: skip


HUB = {"imagenet": "IMAGENET1K_V1", "imagenet-v2": "IMAGENET1K_V2"}  # the values of train.weights


def read_hub(backbone: str, source: str) -> WeightFile:
    """Returns torchvision's ImageNet weights of a backbone, which are downloaded once.

    Args:
        backbone: torchvision's name of the network.
        source: which weights, a key of `HUB`.

    Raises:
        CheckpointError: the backbone has no such weights, or they cannot be loaded.
    """
    try:
        weights = torchvision.models.get_model_weights(backbone)[HUB[source]]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"torchvision has no such ImageNet weights for model.backbone={backbone}: set train.weights "
            f"to a file, or to none to start from random weights"
        ) from error
    try:
        state = weights.get_state_dict(
            progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # The network, the disk or the unpickler may fail.
        why = f"cannot be loaded ({why_unreadable(error)})"
        if isinstance(error, URLError | TimeoutError | ConnectionError):
            host, reason = urlsplit(weights.url).hostname, getattr(error, "reason", error)
            why = f"{host} cannot be reached ({reason})"
        raise CheckpointError(
            f"{why}; give the path of a torchvision {backbone} state dict, or none to start from "
            f"random weights"
        ) from error
    return _renamed(CONVNEXT if backbone.startswith("convnext") else RESNET, _tensors(state))


def read_weights(path: Path) -> WeightFile:
    """Returns the weights of a PyTorch or safetensors file; its suffix does not matter.

    Raises:
        CheckpointError: the file cannot be read, holds pickled code, or has no known layout.
    """
    known = f"give {KNOWN}, or none to start from random weights"
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("is not a file")
        with path.open("rb") as stream:
            start = stream.read(9)
        # A safetensors file begins with a length of eight bytes, followed by JSON.
        content: object = load_file(path) if start[8:] == b"{" else read_torch_file(path)
    except Exception as error:  # safetensors raises exceptions of its own.
        why = error if isinstance(error, CheckpointError) else why_unreadable(error)
        raise CheckpointError(f"cannot be loaded ({why}); {known}") from error
    if isinstance(content, dict) and {"format", "config", "categories"} <= content.keys():
        return _read_checkpoint(path)
    meta: object = None
    for _ in range(3):  # The limit is needed because a dict can contain itself.
        if isinstance(content, dict):
            meta = meta or content.get("meta")
            inner = content.get("state_dict", content.get("model"))
            content = inner if isinstance(inner, dict) else content
    values = _tensors(content)
    for layout in (COMASK, RESNET, CONVNEXT, MASK_RCNN, TORCHVISION, MMDETECTION):
        if any(name.startswith(layout.marks) for name in values):
            if layout is MMDETECTION and CAFFE.search(_text(meta)):
                raise CheckpointError(
                    "its configuration says that it was trained in Caffe's style (BGR images or "
                    "style='caffe'), which comask's backbone does not support; give weights of "
                    "style='pytorch'"
                )
            return _renamed(layout, values)
    raise nothing_fits(content)


def nothing_fits(content: object) -> CheckpointError:
    """Returns the error for a file, or a part of it, that has no weights for CoMask."""
    if isinstance(content, dict):
        keys = [repr(key)[:60] for key in content if isinstance(key, str | int)]
        held = ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "") or "nothing"
    else:
        held = f"a {type(content).__name__}"
    return CheckpointError(f"nothing in it fits: it holds {held}; expected {KNOWN}")


def _read_checkpoint(path: Path) -> WeightFile:
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix(f"{path}: ")) from error
    return dataclasses.replace(
        _renamed(COMASK, _tensors(checkpoint.weights)),
        layout="comask checkpoint",
        settings=dataclasses.asdict(checkpoint.config.model),
        categories=checkpoint.categories,
    )


def _tensors(content: object) -> dict[str, Tensor]:
    """Returns the weights in a dict, without BatchNorm's step counters, which some files lack."""
    if not isinstance(content, dict):
        return {}
    return {
        name.removeprefix("module."): value  # DataParallel's prefix
        for name, value in content.items()
        if isinstance(name, str) and name.isprintable()  # since reports print names
        if not name.endswith(".num_batches_tracked")
        if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
    }


def _renamed(layout: Layout, values: dict[str, Tensor]) -> WeightFile:
    ours = {  # the file's name → our name; at most one pattern matches a name
        name: match.expand(replacement)
        for name in values
        for pattern, replacement in layout.names
        if (match := re.fullmatch(pattern, name))
    }
    left = {name: "" for name in values if name not in ours}
    for start, count in layout.whole:
        members = [name for name in values if name.startswith(start)]
        if len(members) != count or not all(name in ours for name in members):
            for name in members:
                ours.pop(name, None)
                left[name] = OTHERWISE
    if layout is CONVNEXT:  # our blocks have 1×1 convolutions for fully connected layers
        values = {
            name: value[..., None, None] if ".block." in name and value.ndim == 2 else value
            for name, value in values.items()
        }
    return WeightFile(
        layout=layout.title,
        values={ours[name]: values[name] for name in ours},
        names={ours[name]: name for name in ours},
        left=left,
        settings={} if layout is COMASK else {"anchor_ratios": OTHERS_RATIOS},
    )


def _text(meta: object) -> str:
    """Returns the texts in a file's metadata; mmdetection stores its configuration as one of them."""
    values = meta.values() if isinstance(meta, dict) else ()
    return " ".join(value for value in values if isinstance(value, str))
