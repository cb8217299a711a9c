"""CoMask `shapes-tiny` against a torchvision Mask R-CNN of the same width, on equal images.

Both see the same batches in the same order with the same optimiser and schedule, and are scored on
the same 200 unseen images by the same code. The reference is given its best of several learning
rates. Everything is measured in this one run:

    python benchmarks/vs_mask_rcnn.py --output runs/vs_mask_rcnn
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision
from comask.runtime.predictor import Predictor
from comask.runtime.torch_session import torch_stages
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from comask.config import Config
from comask.data.shapes import ShapesSource
from comask.data.training_set import Batch, TrainingSet, epoch_batches, load_batches
from comask.evaluate import evaluate
from comask.models.backbone import build_resnet
from comask.models.comask import CoMask
from comask.presets import preset
from comask.progress import Progress
from comask.structures import Detections
from comask.training.losses import Objective
from comask.training.optim import build_optimizer, learning_rate

TEST_SEED, TEST_IMAGES = 4_000_000, 200


def reference_model(config: Config) -> MaskRCNN:
    """Mask R-CNN with the preset's backbone, widths, anchors, sampling and thresholds."""
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
    """Torchvision's losses for one of our batches (whose images need no padding)."""
    images = [image.permute(2, 0, 1).float() / 255 for image in batch.images]
    targets = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks} for t in batch.targets]
    return model(images, targets)


def reference_detections(model: MaskRCNN, image: np.ndarray) -> Detections:
    """One image through torchvision, its masks left at 28×28."""
    with torch.inference_mode():
        (found,) = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    return Detections(
        boxes_xyxy=found["boxes"].numpy(),
        scores=found["scores"].numpy(),
        labels=found["labels"].numpy() - 1,
        mask_probs=found["masks"][:, 0].numpy(),
        image_size=image.shape[:2],
    )


def train(
    module: nn.Module,
    losses: Callable[[Batch], dict[str, Tensor]],
    config: Config,
    dataset: TrainingSet,
    title: str,
) -> tuple[float, int]:
    """The preset's epochs; returns seconds and the FLOPs of one forward step."""
    module.train()
    optimizer = build_optimizer(module, config.train)
    size, seed = config.train.batch_size, config.train.seed
    epochs = range(config.train.epochs)
    batches = [batch for epoch in epochs for batch in epoch_batches(dataset, size, seed, epoch)]
    per_epoch = len(batches) // len(epochs)
    with FlopCounterMode(display=False) as counter:
        losses(next(iter(load_batches(dataset, batches[:1], workers=0))))
    torch.manual_seed(config.train.seed)
    started = time.perf_counter()
    with Progress(title, len(batches)) as progress:
        for step, batch in enumerate(load_batches(dataset, batches, workers=0)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.train, step, per_epoch, len(batches))
            total = torch.stack(list(losses(batch).values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            progress.advance(note=f"loss {total.item():.3f}")
    return time.perf_counter() - started, counter.get_total_flops()


def run(
    name: str,
    module: nn.Module,
    losses: Callable[[Batch], dict[str, Tensor]],
    predict: Callable[[np.ndarray], Detections],
    config: Config,
) -> dict[str, Any]:
    """Trains and scores one model."""
    images = config.data.shapes_train
    dataset = TrainingSet(
        ShapesSource(num_images=images, seed=config.train.seed),
        list(range(images)),
        config.preprocess,
        flip_probability=config.data.flip_probability,
        seed=config.train.seed,
    )
    title = f"{name}, lr {config.train.learning_rate:g}, seed {config.train.seed}"
    seconds, flops = train(module, losses, config, dataset, title)
    module.eval()
    test = ShapesSource(num_images=TEST_IMAGES, seed=TEST_SEED)
    indices = list(range(TEST_IMAGES))
    metrics = evaluate(test, indices, (predict(test.image(i)) for i in indices))
    return {
        "model": name,
        "learning_rate": config.train.learning_rate,
        "seed": config.train.seed,
        "mask_ap": metrics.values["segm"]["AP"],
        "box_ap": metrics.values["bbox"]["AP"],
        "train_seconds": seconds,
        "gflop_per_image": flops / config.train.batch_size / 1e9,
        "parameters": sum(p.numel() for p in module.parameters()),
        "images": images * config.train.epochs,
    }


def run_comask(config: Config) -> dict[str, Any]:
    """`shapes-tiny`."""
    torch.manual_seed(config.train.seed)
    model = CoMask(config.model, config.preprocess)
    objective = Objective(model)
    return run(
        "CoMask",
        objective,
        lambda batch: objective(batch.images, batch.image_sizes, batch.targets),
        Predictor(torch_stages(model), config.preprocess),
        config,
    )


def run_reference(config: Config) -> dict[str, Any]:
    """Torchvision's Mask R-CNN."""
    torch.manual_seed(config.train.seed)
    model = reference_model(config)
    model.transform.postprocess = lambda found, *_: found  # leave masks at 28×28
    return run(
        "Mask R-CNN",
        model,
        lambda batch: reference_losses(model, batch),
        lambda image: reference_detections(model, image),
        config,
    )


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--learning-rates", default="0.0005,0.0015,0.004", show_default=True)
def main(output: Path, seeds: int, learning_rates: str) -> None:
    """Compare CoMask and Mask R-CNN; writes OUTPUT/results.json."""
    base = preset("shapes-tiny")
    rows = []
    for seed in range(seeds):
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, seed=seed))
        rows.append(run_comask(config))
        for rate in map(float, learning_rates.split(",")):
            tuned = dataclasses.replace(config.train, learning_rate=rate)
            rows.append(run_reference(dataclasses.replace(config, train=tuned)))
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    click.echo("model        lr      seed  mask AP  box AP  train s  GFLOP/image  parameters")
    for row in rows:
        click.echo(
            f"{row['model']:<11}  {row['learning_rate']:<6g}  {row['seed']:<4}  "
            f"{row['mask_ap']:<7.3f}  {row['box_ap']:<6.3f}  {row['train_seconds']:<7.0f}  "
            f"{row['gflop_per_image']:<11.2f}  {row['parameters'] / 1e6:.1f} M"
        )


if __name__ == "__main__":
    main()
