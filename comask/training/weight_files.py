"""Weight files of others, read into CoMask's names: torchvision's, mmdetection's and comask's own.

A file's layout is recognised by the names in it, and nothing in a file is ever executed.

The images must be normalised as the weights learned it. torchvision and mmdetection's `pytorch` style
take RGB in 0..1, less a mean, over a standard deviation; `PreprocessConfig` has the same numbers times
255. ResNets of Caffe's style (BGR, no standard deviation, the stride in another convolution) are another
network under the same names. A file of mmdetection that stores such a configuration is refused; one that
stores none cannot be told apart.
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
    "a comask checkpoint, torchvision's ResNet, Mask R-CNN or Faster R-CNN, or mmdetection's ResNet "
    "with FPN"
)
CAFFE = re.compile(r"to_rgb\W+False|style\W+caffe")  # in mmdetection's configuration
OTHERWISE = "built otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """Weights under our names.

    Attributes:
        layout: for messages.
        values: our name → value, whether or not a given model has that name and shape.
        names: our name → the file's.
        left: the file's other names → why they have no place; empty where there is nothing to say.
        settings: fields of `ModelConfig` of the network that the weights are of, as far as known.
        categories: its classes in label order; empty where unknown.
    """

    layout: str
    values: dict[str, Tensor]
    names: dict[str, str]
    left: dict[str, str]
    settings: dict[str, Any]
    categories: tuple[Category, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the names of others become ours.

    Attributes:
        title: for messages.
        marks: beginnings of names that only this layout has, once those before it are ruled out.
        names: pairs of a pattern and our name; what matches none has no place in CoMask.
        whole: (beginning, number of values) of modules that fit as a whole or not at all. With other
            values in it such a module is another one (normalised, deeper, on other levels).
    """

    title: str
    marks: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    whole: tuple[tuple[str, int], ...] = ()


# Why a plain copy is right where names match: everyone's objectness has one channel an anchor, everyone's
# deltas have (dx, dy, dw, dh) anchor by anchor and unscaled, and anchors come in the order of
# OTHERS_RATIOS, height by width. Their sizes may differ, since deltas count in them. The first fully
# connected layer reads [C, 7, 7] flattened in this order.
OTHERS_RATIOS = (0.5, 1.0, 2.0)
COMASK = Layout(
    title="comask weights without class names", marks=("mfpn.",), names=((r"(.+)", r"\1"),)
)
RESNET = Layout(
    title="torchvision ResNet",
    marks=("layer1.",),
    names=((r"((?:conv1|bn1|layer[1-4])\..+)", r"backbone.\1"),),
)
TORCHVISION = Layout(
    title="torchvision detector",
    marks=("backbone.body.",),
    names=(
        (r"backbone\.body\.(.+)", r"backbone.\1"),
        # the optional parts are those of torchvision ≥ 0.13
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


def read_hub(backbone: str) -> WeightFile:
    """Torchvision's ImageNet weights of a backbone, downloaded once.

    Raises:
        CheckpointError: when there are none, or they cannot be loaded.
    """
    try:
        weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    except ValueError as error:
        raise CheckpointError(
            f"there are no such weights for model.backbone={backbone}: set train.weights to a file, or "
            "to none to start from random weights"
        ) from error
    try:
        state = weights.get_state_dict(
            progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # of the network, the disk or the unpickler
        why = f"cannot be loaded ({why_unreadable(error)})"
        if isinstance(error, URLError | TimeoutError | ConnectionError):
            host, reason = urlsplit(weights.url).hostname, getattr(error, "reason", error)
            why = f"{host} cannot be reached ({reason})"
        raise CheckpointError(
            f"{why}; give the path of a torchvision {backbone} state dict, or none to start from "
            f"random weights"
        ) from error
    return _renamed(RESNET, _tensors(state))


def read_weights(path: Path) -> WeightFile:
    """The weights of a file of PyTorch or safetensors, whatever its name.

    Raises:
        CheckpointError: when it cannot be read, holds pickled code, or has no known layout.
    """
    known = f"give {KNOWN}, or none to start from random weights"
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("is no file")
        with path.open("rb") as stream:
            start = stream.read(9)
        # safetensors begins with eight bytes of length and JSON
        content: object = load_file(path) if start[8:] == b"{" else read_torch_file(path)
    except Exception as error:  # safetensors' own among them
        why = error if isinstance(error, CheckpointError) else why_unreadable(error)
        raise CheckpointError(f"cannot be loaded ({why}); {known}") from error
    if isinstance(content, dict) and {"format", "config", "categories"} <= content.keys():
        return _read_checkpoint(path)
    meta: object = None
    for _ in range(3):  # no more, for a dict can hold itself
        if isinstance(content, dict):
            meta = meta or content.get("meta")
            inner = content.get("state_dict", content.get("model"))
            content = inner if isinstance(inner, dict) else content
    values = _tensors(content)
    for layout in (COMASK, RESNET, MASK_RCNN, TORCHVISION, MMDETECTION):
        if any(name.startswith(layout.marks) for name in values):
            if layout is MMDETECTION and CAFFE.search(_text(meta)):
                raise CheckpointError(
                    "its configuration says that it was trained in Caffe's style (BGR images or "
                    "style='caffe'), which comask's backbone is not; give one of style='pytorch'"
                )
            return _renamed(layout, values)
    raise nothing_fits(content)


def nothing_fits(content: object) -> CheckpointError:
    """The error for a file, or a part of it, that has nothing for CoMask."""
    if isinstance(content, dict):
        keys = [repr(key)[:60] for key in content if isinstance(key, str | int)]
        found = ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "") or "nothing"
    else:
        found = f"a {type(content).__name__}"
    return CheckpointError(f"nothing in it fits: it holds {found}; expected {KNOWN}")


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
    """What of a dict can be weights: not BatchNorm's step counters, which some files lack."""
    if not isinstance(content, dict):
        return {}
    return {
        name.removeprefix("module."): value  # of DataParallel
        for name, value in content.items()
        if isinstance(name, str) and name.isprintable()  # reports print names
        if not name.endswith(".num_batches_tracked")
        if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
    }


def _renamed(layout: Layout, values: dict[str, Tensor]) -> WeightFile:
    ours = {  # the file's name → ours; no two patterns match one name
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
    return WeightFile(
        layout=layout.title,
        values={ours[name]: values[name] for name in ours},
        names={ours[name]: name for name in ours},
        left=left,
        settings={} if layout is COMASK else {"anchor_ratios": OTHERS_RATIOS},
    )


def _text(meta: object) -> str:
    """The configuration that mmdetection stores as text among other things."""
    values = meta.values() if isinstance(meta, dict) else ()
    return " ".join(value for value in values if isinstance(value, str))
