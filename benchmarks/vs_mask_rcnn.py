"""Compares CoMask `shapes-tiny` with a torchvision Mask R-CNN of the same width on equal images.

Both train on the same batches in the same order with the same optimiser and schedule. The same code
scores them on the same 200 unseen images. The reference uses the best of several learning rates. One run
measures everything:

    python benchmarks/vs_mask_rcnn.py --output runs/vs --seeds 3
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import click
import numpy as np
import torch
import torchvision
from shapes_runs import (
    TEST_IMAGES,
    Row,
    base_config,
    comask,
    remembered,
    train_and_score,
    with_seed,
)
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from comask.config import Config
from comask.data.loading import Batch
from comask.models.backbone import build_resnet
from comask.structures import Detections


def reference_model(config: Config) -> MaskRCNN:
    """Returns Mask R-CNN with the preset's backbone, widths, anchors and sampling; its NMS uses 0.5."""
    model = config.model
    resnet, channels = build_resnet(model.backbone)
    layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    backbone = BackboneWithFPN(resnet, layers, list(channels), model.channels)
    levels = ["0", "1", "2", "3"]
    canonical = int(model.roi_canonical_size)
    pools = [
        MultiScaleRoIAlign(levels, size, model.roi_sampling_ratio, canonical_scale=canonical)
        for size in (7, 14)
    ]
    return MaskRCNN(
        backbone,
        num_classes=None,
        min_size=config.preprocess.short_side,
        max_size=config.preprocess.max_side,
        image_mean=[m / 255 for m in config.preprocess.mean],
        image_std=[s / 255 for s in config.preprocess.std],
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in model.anchor_sizes), (model.anchor_ratios,) * 5
        ),
        rpn_pre_nms_top_n_train=model.rpn_top_k_train,
        rpn_pre_nms_top_n_test=model.rpn_top_k,
        rpn_post_nms_top_n_train=model.proposals_train,
        rpn_post_nms_top_n_test=model.proposals,
        rpn_batch_size_per_image=model.rpn_samples,
        box_roi_pool=pools[0],
        box_head=TwoMLPHead(model.channels * 49, model.classifier_width),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(
            model.classifier_width, model.num_classes + 1
        ),
        box_score_thresh=model.score_threshold,
        box_detections_per_img=model.detections,
        box_batch_size_per_image=model.roi_samples,
        box_positive_fraction=model.roi_positive_fraction,
        mask_roi_pool=pools[1],
        mask_head=MaskRCNNHeads(model.channels, (model.channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(model.channels, model.channels, model.num_classes + 1),
    )


def reference_losses(model: MaskRCNN, batch: Batch) -> dict[str, Tensor]:
    """Returns torchvision's losses for one of our batches, whose images need no padding."""
    images = [image.permute(2, 0, 1).float() / 255 for image in batch.images]
    targets = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.bitmaps()}
        for t in batch.targets
    ]
    return model(images, targets)


def reference_detections(model: MaskRCNN, image: np.ndarray) -> Detections:
    """Runs torchvision's model on one image; the masks stay at 28×28."""
    with torch.inference_mode():
        (found,) = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    return Detections(
        boxes_xyxy=found["boxes"].numpy(),
        scores=found["scores"].numpy(),
        labels=found["labels"].numpy() - 1,
        mask_probs=found["masks"][:, 0].numpy(),
        image_size=image.shape[:2],
    )


def reference(config: Config) -> Row:
    """Trains and scores torchvision's Mask R-CNN."""
    torch.manual_seed(config.train.seed)
    model = reference_model(config)
    model.transform.postprocess = lambda found, *_: found  # masks stay at 28×28
    return train_and_score(
        "Mask R-CNN",
        model,
        lambda batch: reference_losses(model, batch),
        lambda image: reference_detections(model, image),
        config,
    )


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--learning-rates", default="0.001,0.002,0.004", show_default=True)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of both models."
)
def main(output: Path, seeds: int, learning_rates: str, settings: tuple[str, ...]) -> None:
    """Compare CoMask with Mask R-CNN and write the rows to OUTPUT/rows.jsonl."""
    base = base_config(settings)
    rates = [float(rate) for rate in learning_rates.split(",")]

    def row(name: str, rate: float, seed: int) -> Row:
        tuned = with_seed(base, seed)
        tuned = dataclasses.replace(
            tuned, train=dataclasses.replace(tuned.train, learning_rate=rate)
        )
        key = {"model": name, "learning_rate": rate, "seed": seed}
        measure = comask if name == "CoMask" else reference
        return remembered(output / "rows.jsonl", key, tuned, measure)

    # The first seed selects the best learning rate of the reference.
    tried = {rate: row("Mask R-CNN", rate, 0) for rate in rates}
    best_rate = max(tried, key=lambda rate: tried[rate]["mask_ap"])
    ours = summarise([row("CoMask", base.train.learning_rate, seed) for seed in range(seeds)])
    best = summarise([row("Mask R-CNN", best_rate, seed) for seed in range(seeds)])
    others = [summarise([tried[rate]]) for rate in rates if rate != best_rate]
    click.echo(f"{TEST_IMAGES} unseen images; mean ± sd over seeds")
    click.echo(
        "model       lr      n  mask AP        box AP  train s  GFLOP/image  GFLOP/s  parameters"
    )
    for line in (ours, best, *others):
        click.echo(
            f"{line['model']:<10}  {line['learning_rate']:<6g}  {line['seeds']}  "
            f"{line['mask_ap']:.3f} ± {line['sd']:.3f}  {line['box_ap']:<6.3f}  "
            f"{line['train_seconds']:<7.0f}  {line['gflop_per_image']:<11.2f}  "
            f"{line['gflop_per_second']:<7.1f}  {line['parameters'] / 1e6:.1f} M"
        )
    click.echo(
        f"CoMask is {100 * (ours['mask_ap'] - best['mask_ap']):+.1f} points of mask AP from the best "
        f"Mask R-CNN; FLOPs per second {ours['gflop_per_second'] / best['gflop_per_second']:.2f} times"
    )


def summarise(rows: list[Row]) -> Row:
    """Returns the mean of every number over seeds, and the standard deviation of mask AP."""
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    row = rows[0] | {key: statistics.mean(r[key] for r in rows) for key in numbers}
    row["seeds"] = len(rows)
    row["sd"] = statistics.stdev(r["mask_ap"] for r in rows) if len(rows) > 1 else 0.0
    row["gflop_per_second"] = row["gflop_per_image"] * row["images"] / row["train_seconds"]
    return row


if __name__ == "__main__":
    main()
