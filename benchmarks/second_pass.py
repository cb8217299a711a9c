"""Measures what the options beyond the paper bring and cost: agreement, second boxes, mask scoring.

`shapes-tiny` is trained on shapes with mask scoring and several seeds. That branch changes no other
weight, and the other options have none, so one training serves every row: only scores and boxes differ.
The oracle multiplies class scores by the true IoU of each mask, which no estimate can exceed. One more
row shows why second boxes need a frame of their own: masks pasted into them.

    python benchmarks/second_pass.py --output runs/second-pass --seeds 3
    python benchmarks/second_pass.py --output runs/second-pass --cost
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from pycocotools import mask as coco_mask
from shapes_runs import trained
from torch.utils.flop_counter import FlopCounterMode

from comask.data.shapes import ShapesSource
from comask.evaluate import evaluate
from comask.models.comask import CoMask
from comask.presets import preset
from comask.runtime.backends.pytorch import torch_stages
from comask.runtime.predictor import Predictor
from comask.structures import Detections

TEST_SEED = 8_000_000  # of images that no training has seen
AGREEMENT, BOXES, SCORING = "agreement_score", "second_boxes", "mask_scoring"
VARIANTS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "agreement": (AGREEMENT,),
    "second boxes": (BOXES,),
    "agreement, second boxes": (AGREEMENT, BOXES),
    "mask scoring": (SCORING,),
    "all": (AGREEMENT, BOXES, SCORING),
}
ORACLE = "oracle of the mask's IoU"
ONE_FRAME = "second boxes, masks pasted into them"
CANVAS, TURNS = (800, 1344), 7


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True)
@click.option("--images", type=click.IntRange(10), default=500, show_default=True,
              help="Number of unseen images.")  # fmt: skip
@click.option("--cost", is_flag=True, help="Measure FLOPs and times of comask-r50 instead.")
def main(output: Path, seeds: int, images: int, cost: bool) -> None:
    """Train what OUTPUT lacks, and print a Markdown table; OUTPUT/rows.json gets the numbers."""
    if cost:
        click.echo("\n".join(costs()))
        return
    rows = [measure(model_of(output, seed), images) for seed in range(seeds)]
    (output / "rows.json").write_text(json.dumps(rows, indent=2))
    click.echo("\n".join(table(rows, images)))


def model_of(output: Path, seed: int) -> CoMask:
    """Returns the model of one seed, with the branch of mask scoring."""
    settings = {"train.seed": seed, "train.evaluate_every": 0, f"model.{SCORING}": True}
    return trained("shapes", output / f"seed-{seed}", settings)


def with_options(model: CoMask, options: tuple[str, ...]) -> None:
    """Turns these options on and the others off."""
    switches = {name: name in options for name in (AGREEMENT, BOXES, SCORING)}
    model.config = dataclasses.replace(model.config, **switches)


def measure(model: CoMask, images: int) -> dict[str, dict[str, float]]:
    """Returns `AP` and `AP75` of boxes and masks in points, by variant."""
    source, indices = ShapesSource(num_images=images, seed=TEST_SEED), list(range(images))
    scorer, row = model.mask_scorer, {}
    for name, options in VARIANTS.items():
        model.mask_scorer = scorer if SCORING in options else None
        with_options(model, options)
        predictor = Predictor(
            torch_stages(model),
            preset("shapes-tiny").preprocess,
            mask_threshold=model.config.mask_threshold,
        )
        found = [predictor(source.image(i)) for i in indices]
        row[name] = points(source, indices, found)
        if name == "second boxes":
            moved = [dataclasses.replace(one, mask_boxes_xyxy=None) for one in found]
            row[ONE_FRAME] = points(source, indices, moved)
        if name == "paper":
            row[ORACLE] = points(
                source, indices, [true_scores(source, i, found[i]) for i in indices]
            )
    model.mask_scorer = scorer
    return row


def points(source: ShapesSource, indices: list[int], found: list[Detections]) -> dict[str, float]:
    """Scores the detections in each image."""
    values = evaluate(source, indices, iter(found)).values
    return {
        f"{title} {metric}": 100 * values[task][metric]
        for task, title in (("segm", "mask"), ("bbox", "box"))
        for metric in ("AP", "AP75")
    }


def true_scores(source: ShapesSource, index: int, found: Detections) -> Detections:
    """Multiplies scores by the largest IoU of each mask with an object of its class."""
    objects = [a for a in source.annotations(index) if not a["iscrowd"]]
    if not len(found) or not objects:
        return found
    ious = coco_mask.iou(found.to_rle(), [a["segmentation"] for a in objects], [0] * len(objects))
    ids = np.array([a["category_id"] for a in objects])
    own = np.array([source.categories[label].id for label in found.labels])
    best = (ious * (own[:, None] == ids)).max(axis=1)
    scored = dataclasses.replace(found, scores=(found.scores * best).astype(np.float32))
    return scored[np.argsort(-scored.scores, kind="stable")]


def table(rows: list[dict[str, dict[str, float]]], images: int) -> Iterator[str]:
    """Yields a Markdown table of means ± deviations, and of differences to the paper's form."""
    yield (
        f"mean ± sd of {len(rows)} seeds, {images} unseen images; in brackets the difference to the "
        f"paper, seed by seed"
    )
    yield ""
    metrics = list(rows[0]["paper"])
    yield "| form | " + " | ".join(metrics) + " |"
    yield "|---" * (len(metrics) + 1) + "|"
    for name in (*VARIANTS, ONE_FRAME, ORACLE):
        cells = []
        for metric in metrics:
            values = [row[name][metric] for row in rows]
            text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            if name != "paper":
                gains = [row[name][metric] - row["paper"][metric] for row in rows]
                text += f" ({', '.join(f'{gain:+.2f}' for gain in gains)})"
            cells.append(text)
        yield f"| {name} | {' | '.join(cells)} |"


@torch.inference_mode()
def costs() -> Iterator[str]:
    """Yields a Markdown table of stage 2's work in `comask-r50`, in PyTorch on the CPU."""
    config = dataclasses.replace(preset("comask-r50").model, mask_scoring=True, score_threshold=0.0)
    torch.manual_seed(0)
    model = CoMask(config, preset("comask-r50").preprocess).eval()
    sizes = torch.tensor([CANVAS], dtype=torch.int32)
    features = model.stage1(torch.randint(0, 256, (1, *CANVAS, 3), dtype=torch.uint8), sizes)
    scorer = model.mask_scorer
    flops: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}

    def run(name: str) -> dict[str, Any]:
        model.mask_scorer = scorer if SCORING in VARIANTS[name] else None
        with_options(model, VARIANTS[name])
        return model.stage2(**features, image_sizes=sizes)

    for name in VARIANTS:
        with FlopCounterMode(display=False) as counter:
            assert run(name)["num_detections"].item() == config.detections
        flops[name] = counter.get_total_flops() / 1e9
    for _ in range(TURNS):
        for name, seconds in times.items():
            started = time.perf_counter()
            run(name)
            seconds.append(time.perf_counter() - started)
    yield (
        f"stage 2 of comask-r50, {config.detections} detections on {CANVAS[0]}x{CANVAS[1]}, PyTorch on "
        f"{torch.get_num_threads()} threads, median of {TURNS} turns; parameters of the branch: "
        f"{sum(p.numel() for p in scorer.parameters()) / 1e6 if scorer else 0:.2f} M"
    )
    yield ""
    yield "| form | GFLOP | ms | against the paper |"
    yield "|---|---|---|---|"
    paper = np.array(times["paper"])
    for name, seconds in times.items():
        ratio = np.median(np.array(seconds) / paper)
        milliseconds = 1000 * statistics.median(seconds)
        yield f"| {name} | {flops[name]:.2f} | {milliseconds:.0f} | {ratio:.3f} |"


if __name__ == "__main__":
    main()
