"""Defines every setting of comask with its default and its reason; presets are in `comask.presets`.

Each part of the toolkit owns one of four frozen dataclasses, which `Config` joins. `--set`, checkpoints
and manifests use a setting's dotted name (`model.msfem_branches`). The defaults follow the paper and,
where it does not state one, the authors' configuration (docs/algorithm.md).
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, Literal

from comask.errors import ConfigError

CANDIDATES = 1000  # (proposal, class) pairs per image that enter the detections' NMS
# The largest maps have 16 values per pixel of the canvas; a TensorRT tensor has fewer than 2^31 values.
MOST_PIXELS = 2**27 - 1
SHOWN = 100  # characters that an error shows of a wrong value
# Of `comask.runtime.views.Views`, which the command line checks before it imports the runtime.
LEAST_TILE = 32  # pixels
TILE_OVERLAP = 0.2  # of neighbouring tiles, as a share of a tile's side: SAHI's default
MOST_OVERLAP = 0.9  # there, each pixel is run 100 times
AUGMENTATIONS = ("flip", "vflip", "scale")


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises an error unless `condition` holds.

    Raises:
        ConfigError: when `condition` does not hold; the text begins with `name`.
    """
    if not condition:
        text = repr(got)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        raise ConfigError(f"{name}: expected {expected}, got {shown}")


def require_count(name: str, value: object, most: int | None = None) -> None:
    """Checks that `value` is a whole number of at least 1 and, if `most` is given, at most that.

    Raises:
        ConfigError: when it is not; the text begins with `name`.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    expected = f"a whole number from 1 {'on' if most is None else f'to {most}'}"
    require(whole and 1 <= int(value) <= (most or int(value)), name, expected, value)  # type: ignore[call-overload]


# A condition on a setting: its words in an error, and the check of a value.
Rule = tuple[str, Callable[[Any], bool]]
AT_LEAST_1: Rule = "at least 1", lambda value: value >= 1
NOT_NEGATIVE: Rule = "0 or more", lambda value: value >= 0
POSITIVE: Rule = "above 0", lambda value: value > 0
FRACTION: Rule = "0 ≤ value < 1", lambda value: 0 <= value < 1


def _between(least: int, most: int) -> Rule:
    return f"{least} to {most}", lambda value: least <= value <= most


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _require_each(part: str, config: object, rule: Rule, *names: str) -> None:
    """Checks the fields of these names in `config` by one rule."""
    expected, holds = rule
    for name in names:
        value = getattr(config, name)
        require(holds(value), f"{part}.{name}", expected, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The network and its targets. Sizes are pixels of the resized image."""

    num_classes: int = 80

    # Backbone. BatchNorm keeps ImageNet's statistics, as in every COCO recipe with small batches.
    backbone: Literal["resnet18-slim", "resnet18", "resnet50", "resnet101", "convnext_tiny"] = (
        "resnet50"
    )
    # "batch" and "group" are for training from scratch; "group" works with any batch size. ConvNeXt has
    # LayerNorm instead, for any value.
    backbone_norm: Literal["frozen", "batch", "group"] = "frozen"
    frozen_stages: int = 2  # 2: the stem and the first stage; 0 trains everything

    # FPN and MSFEM (section 3.1)
    channels: int = 256
    norm_groups: int = 32
    msfem_branches: int = 4  # the i of Table 2's CoMask_i
    msfem_mode: Literal["independent", "chain", "tied"] = "independent"
    msfem_place: Literal["after", "replace"] = "after"  # after or instead of the FPN's 3×3 convs
    attention_reduction: int = 4
    residual_attention: bool = False  # ReLU(x + GN(conv(x))) instead of equation 7's convolution

    # RPN
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)  # one per level, P2..P6
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_nms_iou: float = 0.7
    rpn_top_k_train: int = 2000  # per level, before NMS
    rpn_top_k: int = 1000
    proposals_train: int = 2000  # per image, after NMS
    proposals: int = 1000

    # Classification branch: plain two-FC head, no box regression
    roi_samples: int = 512
    roi_positive_fraction: float = 0.25
    roi_positive_iou: float = 0.5
    classifier_width: int = 1024
    score_threshold: float = 0.05
    nms_iou: float = 0.3
    detections: int = 100

    # Collaborative head (section 3.2)
    head_channels: int = 256
    head_convs: int = 9  # convolutions after the one of stride 2
    mask_kernel: Literal[1, 3] = 3  # kernel size of the last convolution
    head_rois: int = 96  # positive RoIs per image that train the head; the authors': 192 for two
    roi_jitter: float = 0.15  # shifts centre and size of RoIs, which imitates refined boxes
    roi_sampling_ratio: int = 2
    roi_canonical_size: float = 224.0  # a RoI of this side is pooled from P4
    # "uniform" is Table 3's w/o CL; "fc_reg" regresses boxes in the classification branch instead.
    collaboration: Literal["weighted", "uniform", "fc_reg"] = "weighted"
    offset_activation: Literal["relu", "exp", "none"] = "relu"
    cell_pooling: Literal["sigmoid", "logit", "bilinear"] = "sigmoid"  # pools the mask to M_s
    cell_threshold: float = 0.5  # cells with M_s above it vote; 0 lets every cell vote
    empty_foreground: Literal["confidence", "proposal"] = "confidence"  # counts if no cell votes
    cell_targets: Literal["truth", "soft", "pred"] = "truth"  # weights of the cells in training
    box_loss: Literal["iou", "giou"] = "iou"
    train_refined_masks: bool = False  # adds a second mask loss on the refined boxes
    separate_fine_head: bool = False  # gives the second pass its own head, trained by that loss
    refined_nms_iou: float = 0.0  # threshold of a second NMS on the refined boxes; 0: no second NMS
    # Beyond the paper, which takes masks alone from the second pass. Only mask_scoring has weights.
    agreement_score: bool = False  # multiplies scores by the IoU of refined and second-pass boxes
    second_boxes: bool = False  # returns the second pass's boxes; masks stay in the refined ones
    mask_scoring: bool = False  # multiplies scores by a branch's estimate of the mask's IoU
    mask_threshold: float = 0.5  # pixels of at least this probability belong to the pasted mask

    # Losses
    rpn_objectness_weight: float = 1.0
    rpn_box_weight: float = 1.0
    class_weight: float = 2.0
    mask_weight: float = 1.0
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        check, groups = partial(_require_each, "model", self), self.norm_groups
        check(
            AT_LEAST_1, "num_classes", "norm_groups", "attention_reduction", "rpn_samples",
            "rpn_top_k_train", "proposals_train", "roi_samples", "classifier_width", "head_rois",
            "roi_sampling_ratio",
        )  # fmt: skip
        check(_between(1, 4), "msfem_branches")
        check(NOT_NEGATIVE, "head_convs")
        check(POSITIVE, "roi_canonical_size")
        positive = "numbers above 0", lambda sizes: bool(sizes) and min(sizes) > 0
        check(positive, "anchor_sizes", "anchor_ratios")
        multiple = f"a multiple of model.norm_groups = {groups}"
        check((multiple, lambda v: v > 0 and v % groups == 0), "channels", "head_channels")
        check(("5 sizes", lambda sizes: len(sizes) == 5), "anchor_sizes")
        check(_between(0, 5), "frozen_stages")
        check(_between(1, 3840), "rpn_top_k", "proposals")  # the limit of TensorRT's TopK
        check(_between(1, CANDIDATES), "detections")
        check(
            FRACTION, "rpn_nms_iou", "nms_iou", "score_threshold", "cell_threshold",
            "refined_nms_iou", "mask_threshold",
        )  # fmt: skip
        if not self.train_refined_masks:
            needed = "false unless model.train_refined_masks=true, which trains that head"
            check((needed, operator.not_), "separate_fine_head")
        if self.collaboration == "fc_reg":
            without = "with model.collaboration=fc_reg, which has no dense boxes to refine with"
            check(
                (f"false {without}", operator.not_), "train_refined_masks", "agreement_score",
                "second_boxes",
            )  # fmt: skip
        if self.separate_fine_head:
            without = "with model.separate_fine_head=true, which predicts no boxes"
            check((f"false {without}", operator.not_), "agreement_score", "second_boxes")
        without = f"it has no effect with model.collaboration={self.collaboration}"
        for f in dataclasses.fields(self):
            if f.name in IDLE.get(self.collaboration, ()):
                check((f"{f.default}: {without}", partial(operator.eq, f.default)), f.name)


# The settings that have no effect with a value of model.collaboration.
IDLE = {
    "uniform": ("cell_pooling", "cell_threshold", "empty_foreground", "cell_targets"),
    "fc_reg": (
        "cell_pooling", "cell_threshold", "empty_foreground", "cell_targets", "box_loss",
        "offset_activation",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    """The steps from a decoded image to the network's input; bundles store them for every backend."""

    short_side: int = 800
    max_side: int = 1333
    pad_multiple: int = 32
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # ImageNet's, RGB in 0..255
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        name, short, multiple = "preprocess.short_side", self.short_side, self.pad_multiple
        require_count(name, short)
        require(short <= self.max_side, name, f"1 to max_side = {self.max_side}", short)
        stride = "a multiple of 32, the stride of P5"
        require(multiple % 32 == 0 and multiple > 0, "preprocess.pad_multiple", stride, multiple)
        h, w = (-(-side // multiple) * multiple for side in (short, self.max_side))
        canvas = f"a canvas of at most {MOST_PIXELS} pixels, TensorRT's limit, instead of {h}x{w}"
        require(h * w <= MOST_PIXELS, name, canvas, short)

    def resized(self, short_side: int) -> PreprocessConfig:
        """Returns a copy with another `short_side` and `max_side` scaled by the same factor.

        Raises:
            ConfigError: when `short_side` is not a length, or the canvas would be too large.
        """
        require_count("short_side", short_side)
        max_side = round(short_side * self.max_side / self.short_side)
        try:
            return dataclasses.replace(self, short_side=short_side, max_side=max_side)
        except ConfigError as error:
            raise ConfigError(
                f"short_side: expected a canvas of at most {MOST_PIXELS // 10**6} megapixels, got "
                f"{short_side}"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How images are selected, loaded and augmented."""

    flip_probability: float = 0.5  # of exchanging left and right
    vertical_flip_probability: float = 0.0
    turn_probability: float = 0.0  # of a turn by 90, 180 or 270 degrees
    # Multi-scale training: values of preprocess.short_side, one of them at random for each image.
    short_sides: tuple[int, ...] = ()
    # Large-scale jitter: the factor of an image's size, [least, most]. Below 1 the image becomes smaller;
    # above 1 a random part of it is enlarged to the usual size.
    scale_range: tuple[float, float] = (1.0, 1.0)
    copy_paste_probability: float = 0.0  # of pasting objects of another image
    colour: float = 0.0  # strength of changes in brightness, contrast, saturation and hue
    # Images of a class that less than this share of the images has are repeated; LVIS's recipe has 0.001.
    repeat_threshold: float = 0.0
    val_fraction: float = 0.1  # share of images for validation without --val; the seed selects them
    # A regular expression. Images whose file names agree in its first group are never parted.
    val_group: str = ""
    boxes: Literal["annotated", "mask"] = "annotated"  # "mask": the bounds of each mask
    workers: int = 2
    shapes_train: int = 4000  # images that --data shapes makes for training
    shapes_val: int = 200  # and for validation

    def __post_init__(self) -> None:
        check = partial(_require_each, "data", self)
        check(
            _between(0, 1), "flip_probability", "vertical_flip_probability", "turn_probability",
            "copy_paste_probability",
        )  # fmt: skip
        check(FRACTION, "colour", "repeat_threshold")
        check(("sides of at least 1", lambda v: min(v, default=1) >= 1), "short_sides")
        check(("[least, most] above 0", lambda v: 0 < v[0] <= v[1]), "scale_range")
        check(("0 < value < 1", lambda v: 0 < v < 1), "val_fraction")
        check(("a regular expression", _is_pattern), "val_group")
        check(NOT_NEGATIVE, "workers")
        check(AT_LEAST_1, "shapes_train", "shapes_val")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The training schedule (section 4.1) and its execution.

    `batch_size` counts the images of one optimiser step on all processes together. `learning_rate` is
    that of `reference_batch` images; it is scaled linearly to `batch_size`.
    """

    # "none", torchvision's weights "imagenet" or the newer "imagenet-v2", or a file to start from
    weights: str = "imagenet"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["step", "one_cycle"] = "step"
    learning_rate: float = 0.01
    # The backbone's stages have smaller rates: the last one's is multiplied by this factor once, the one
    # before twice, the stem's five times.
    layer_decay: float = 1.0
    reference_batch: int = 8
    batch_size: int = 8  # 0, or "auto" on the command line: as large as the GPU's memory allows
    micro_batch: int = 0  # images per pass, with accumulated gradients; 0: a process's whole share
    momentum: float = 0.9  # for sgd
    adamw_beta2: float = 0.999
    weight_decay: float = 1e-4
    clip_norm: float = 0.0  # largest norm of the gradient; 0: no clipping
    epochs: int = 24
    max_steps: int = -1  # ends training before `epochs` are over; -1: no such limit
    step_epochs: tuple[int, ...] = (20, 23)  # mmdetection's 2× schedule has [16, 22]
    step_factor: float = 0.1
    warmup_steps: int = 1000
    warmup_factor: float = 1 / 80
    ema_decay: float = 0.0  # decay of the averaged weights to evaluate; 0: no averaging
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast's; fp16 needs a GPU
    channels_last: bool = False
    checkpoint_activations: bool = False  # computes backbone and MFPN twice, which saves memory
    compile: bool = False  # compiles backbone, MFPN and heads with torch.compile
    checkpoint_every: int = 1000  # in steps
    evaluate_every: int = 1  # in epochs; training also ends with an evaluation; 0: no evaluation
    patience: int = 0  # evaluations without a better mask AP after which training ends; 0: never
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check = partial(_require_each, "train", self)
        check(AT_LEAST_1, "epochs", "checkpoint_every", "reference_batch")
        check(
            NOT_NEGATIVE, "batch_size", "micro_batch", "warmup_steps", "evaluate_every", "patience",
            "clip_norm", "seed", "weight_decay",
        )  # fmt: skip
        check(("-1 or more", lambda v: v >= -1), "max_steps")
        check(POSITIVE, "learning_rate")
        check(("0 < value ≤ 1", lambda v: 0 < v <= 1), "layer_decay")
        check(FRACTION, "ema_decay", "momentum", "adamw_beta2")
        if not self.evaluate_every:
            check(("0 unless train.evaluate_every is above 0", operator.not_), "patience")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        most = self.preprocess.max_side
        fitting = f"sides of at most preprocess.max_side = {most}"
        _require_each(
            "data", self.data, (fitting, lambda v: max(v, default=0) <= most), "short_sides"
        )
