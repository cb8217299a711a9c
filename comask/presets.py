"""Defines named configurations.

These are the paper's models (Tables 1 to 3), the same network with more from its second pass, two for
training on a CPU, and two with what other detectors have gained by: more augmentation, longer schedules,
newer weights and a newer backbone.
"""

from __future__ import annotations

from dataclasses import replace

from comask.config import Config, DataConfig, ModelConfig, PreprocessConfig, TrainConfig
from comask.errors import ConfigError

PAPER = Config()

# The paper's network and schedule, with what helped on shapes (docs/algorithm.md, beyond the paper).
PLUS = replace(
    PAPER,
    model=replace(PAPER.model, agreement_score=True, second_boxes=True, mask_scoring=True),
)

SHAPES_TINY = Config(
    model=ModelConfig(
        num_classes=8,
        backbone="resnet18-slim",
        backbone_norm="batch",  # training from scratch needs statistics of its own
        frozen_stages=0,
        channels=64,
        norm_groups=16,
        msfem_branches=2,
        head_channels=64,
        head_convs=4,
        anchor_sizes=(14.0, 28.0, 56.0, 90.0, 120.0),
        rpn_samples=128,
        rpn_top_k_train=200,
        rpn_top_k=200,
        proposals_train=200,
        proposals=200,
        roi_samples=32,
        roi_positive_fraction=0.5,
        classifier_width=256,
        detections=32,
        head_rois=16,
        # From scratch, the loss with the largest gradient shapes the shared features. With the default
        # weights that is the classifier's, and masks improve late (docs/algorithm.md).
        class_weight=1.0,
        mask_weight=16.0,
        box_weight=8.0,
        roi_canonical_size=112.0,
    ),
    preprocess=PreprocessConfig(short_side=96, max_side=160),
    data=DataConfig(workers=0, shapes_train=2560, shapes_val=60),
    train=TrainConfig(
        weights="none",
        optimizer="adamw",
        schedule="one_cycle",
        learning_rate=2e-3,
        adamw_beta2=0.99,  # 0.999 would average over more steps than the run has
        weight_decay=0.05,
        epochs=2,
        warmup_steps=50,
        checkpoint_every=100,
    ),
)

# The same network for photographs: small enough to train on real data without a GPU.
COCO_SLIM = Config(
    model=replace(
        SHAPES_TINY.model,
        num_classes=80,
        anchor_sizes=(16.0, 32.0, 64.0, 128.0, 256.0),
        rpn_samples=256,
        rpn_top_k_train=500,
        rpn_top_k=500,
        proposals_train=500,
        proposals=300,
        roi_samples=64,
        detections=100,
    ),
    preprocess=PreprocessConfig(short_side=192, max_side=320),
    train=replace(SHAPES_TINY.train, batch_size=4, epochs=40, warmup_steps=50, evaluate_every=20),
)

# The paper's network in a longer recipe. In the model zoos of others, large-scale jitter with 100 epochs
# brings Mask R-CNN some 5 points of AP, and weights of a longer ImageNet recipe 3 (docs/training.md).
R50_PLUS = replace(
    PAPER,
    model=replace(PAPER.model, frozen_stages=0),
    data=DataConfig(scale_range=(0.1, 2.0), workers=8),
    train=replace(
        PAPER.train,
        weights="imagenet-v2",
        optimizer="adamw",  # with which weights of that recipe are fine-tuned
        learning_rate=1e-4,
        weight_decay=0.05,
        clip_norm=1.0,
        epochs=100,
        step_epochs=(88, 96),
        ema_decay=0.9998,
        evaluate_every=5,
    ),
)

# ConvNeXt-T by the recipe of its authors' detectors: three times the usual schedule at several sizes.
CONVNEXT_T = replace(
    PAPER,
    model=replace(PAPER.model, backbone="convnext_tiny", frozen_stages=0),
    data=DataConfig(short_sides=tuple(range(480, 801, 32)), workers=8),
    train=replace(
        PAPER.train,
        optimizer="adamw",
        learning_rate=1e-4,
        reference_batch=16,
        weight_decay=0.05,
        layer_decay=0.9,
        clip_norm=1.0,
        epochs=36,
        step_epochs=(27, 33),
    ),
)

PRESETS: dict[str, Config] = {
    "comask-r50": PAPER,
    "comask-r101": replace(PAPER, model=replace(PAPER.model, backbone="resnet101")),
    "comask1-r50": replace(PAPER, model=replace(PAPER.model, msfem_branches=1)),
    "comask2-r50": replace(PAPER, model=replace(PAPER.model, msfem_branches=2)),
    "no-collaboration-r50": replace(PAPER, model=replace(PAPER.model, collaboration="uniform")),
    "comask-plus-r50": PLUS,
    "comask-r50-plus": R50_PLUS,
    "comask-convnext-t": CONVNEXT_T,
    "shapes-tiny": SHAPES_TINY,
    "coco-slim": COCO_SLIM,
}


def preset(name: str) -> Config:
    """Returns the configuration called `name`.

    Raises:
        ConfigError: when the preset does not exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
